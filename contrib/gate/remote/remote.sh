#!/bin/sh
# remote.sh launch    wakes a machine by wake-on-LAN, and returns when it answers
# remote.sh stop      puts it to sleep by ssh, and returns when it does not answer any more
#
# Each may be called at any time: what is already so is left alone. It needs a POSIX shell, socat, and ssh.
#
# HOST       the machine: its address, or a name that can be looked up while it sleeps
# MAC        the address of its network card, as 00:11:22:33:44:55
# BROADCAST  where the magic packet goes: the broadcast address of the machine's network, as 192.168.1.255
# KEY        the private key for ssh; the host key must be in KNOWN_HOSTS
# KNOWN_HOSTS  file; /etc/hibergated-remote/known_hosts by default
# LOGIN      the user at the machine; root by default
# SLEEP      what the machine shall do: suspend (the default), hibernate or poweroff. See nap.sh
# PORT       the port of ssh, which also tells whether the machine is awake; 22 by default
# WAIT       seconds that launch and stop wait for the machine; 60 by default
set -eu

fail() {
	printf 'remote.sh: %s\n' "$*" >&2
	exit 1
}

# given NAME VALUE: dies if there is none.
given() {
	[ -n "$2" ] || fail "$1 is not set"
}

# awake: whether the machine answers.
awake() {
	socat -u OPEN:/dev/null "TCP:$host:$port,connect-timeout=1" 2>/dev/null
}

# magic: prints the packet: six times 0xff, and the address of the network card sixteen times.
magic() {
	octal=
	rest=$mac
	while [ -n "$rest" ]; do
		octal=$octal$(printf '\\%03o' "0x${rest%%:*}")
		case $rest in
		*:*) rest=${rest#*:} ;;
		*) rest= ;;
		esac
	done
	packet='\377\377\377\377\377\377'
	for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
		packet=$packet$octal
	done
	# The octal escapes are the format: not all printf know them in an argument.
	# shellcheck disable=SC2059
	printf "$packet"
}

launch() {
	given MAC "$mac"
	given BROADCAST "$broadcast"
	printf '%s\n' "$mac" | grep -Eqx '([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}' || fail "MAC must be like 00:11:22:33:44:55, got \"$mac\""
	left=$patience
	until awake; do
		[ "$left" -gt 0 ] || fail "$host does not answer at port $port, $patience s after the first magic packet"
		# Nobody acknowledges it, so it is sent until the machine answers.
		magic | socat -u STDIN "UDP4-DATAGRAM:$broadcast:9,broadcast" || fail "send a magic packet to $broadcast"
		left=$((left - 1))
		sleep 1
	done
}

stop() {
	given KEY "$key"
	awake || return 0
	# An agent or another key might do more than this one, which may do nothing but this. The connection may break when the
	# machine is already asleep.
	ssh -F none -T -o BatchMode=yes -o IdentitiesOnly=yes -o IdentityAgent=none -o StrictHostKeyChecking=yes \
		-o UserKnownHostsFile="$known" -o ConnectTimeout=5 -o ServerAliveInterval=2 -o ServerAliveCountMax=2 \
		-i "$key" -p "$port" -l "$login" -- "$host" "$action" </dev/null ||
		! awake || fail "$host does not go to sleep"
	left=$patience
	while awake; do
		[ "$left" -gt 0 ] || fail "$host still answers, $patience s after it was told to $action"
		left=$((left - 1))
		sleep 1
	done
}

host=${HOST:-}
mac=${MAC:-}
broadcast=${BROADCAST:-}
key=${KEY:-}
known=${KNOWN_HOSTS:-/etc/hibergated-remote/known_hosts}
login=${LOGIN:-root}
action=${SLEEP:-suspend}
port=${PORT:-22}
patience=${WAIT:-60}
given HOST "$host"
case $host in
-*) fail "HOST must be a name or an address, got \"$host\"" ;;
esac
case $patience in
'' | *[!0-9]*) fail "WAIT must be a number, got \"$patience\"" ;;
esac
case $action in
suspend | hibernate | poweroff) ;;
*) fail "SLEEP must be suspend, hibernate or poweroff, got \"$action\"" ;;
esac
case ${1:-} in
launch | stop) "$1" ;;
*) fail "usage: remote.sh launch|stop" ;;
esac
