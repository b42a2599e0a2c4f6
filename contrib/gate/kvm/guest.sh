#!/bin/sh
# guest.sh launch NAME QEMU [ARGUMENT...]    starts a guest of plain QEMU, or lets it run on if it is paused
# guest.sh stop NAME                         presses its power button, and returns when it is off
# guest.sh pause NAME                        stops its CPUs; its memory stays where it is
#
# Each may be called at any time: what is already so is left alone. It needs a POSIX shell, socat, and grep.
#
# GUESTS     directory for the socket and the pid file of each guest; /run/hibergated-guests by default
# STOP_WAIT  seconds that stop gives the guest to shut down; then QEMU is told to quit, as if the power failed. 60 by default
#
# Where systemd runs, the guest gets a scope of its own. Otherwise it would be a part of hibergated.service, and end with it.
set -eu

fail() {
	printf 'guest.sh: %s\n' "$*" >&2
	exit 1
}

# qmp COMMAND: sends it to QEMU and prints the answer. Status 1 if there is no QEMU, or none that answers.
qmp() {
	answer=$(printf '{"execute":"qmp_capabilities"}\n{"execute":"%s"}\n' "$1" |
		socat -t 5 -T 10 STDIO "UNIX-CONNECT:$socket" 2>/dev/null) || return 1
	# A greeting, then one answer for each of the two; events may be in between.
	printf '%s\n' "$answer"
	[ "$(printf '%s\n' "$answer" | grep -c '"return":')" = 2 ]
}

# running: whether there is a QEMU. One that was killed leaves its pid file behind, and another process may have the number by now.
running() {
	[ -s "$pidfile" ] && grep -q qemu "/proc/$(cat "$pidfile")/comm" 2>/dev/null
}

launch() {
	if running; then
		case $(qmp query-status) in
		*'"status": "paused"'*) qmp cont >/dev/null || fail "$name: QEMU does not continue" ;;
		*'"running": true'*) ;;
		*) fail "$name: QEMU runs, but its guest neither runs nor is it paused" ;;
		esac
		return 0
	fi
	[ "$#" -gt 0 ] || fail "$name does not run, and there is no command of QEMU to start it"
	rm -f "$socket"
	set -- "$@" -name "$name" -daemonize -pidfile "$pidfile" -qmp "unix:$socket,server=on,wait=off"
	if [ -d /run/systemd/system ]; then
		set -- systemd-run --quiet --scope --collect --unit="guest-$name" -- "$@"
	fi
	"$@" || fail "$name: QEMU did not start"
}

pause() {
	running || return 0
	qmp stop >/dev/null || fail "$name: QEMU does not pause"
}

stop() {
	running || return 0
	# A guest that is paused cannot shut down.
	qmp cont >/dev/null || fail "$name: QEMU does not answer"
	qmp system_powerdown >/dev/null || fail "$name: QEMU does not press the power button"
	left=$patience
	while running; do
		if [ "$left" -le 0 ]; then
			printf 'guest.sh: %s is not off after %s s; QEMU quits\n' "$name" "$patience" >&2
			qmp quit >/dev/null || :
			sleep 1
			! running || fail "$name: QEMU does not quit"
			return 0
		fi
		left=$((left - 1))
		sleep 1
	done
}

command=${1:-}
name=${2:-}
case $command in
launch | stop | pause) ;;
*) fail "usage: guest.sh launch|stop|pause NAME [QEMU ARGUMENT...]" ;;
esac
case $name in
'' | *[!A-Za-z0-9_-]*) fail "the name of a guest has letters, digits, _ and -; got \"$name\"" ;;
esac
shift 2
patience=${STOP_WAIT:-60}
case $patience in
'' | *[!0-9]*) fail "STOP_WAIT must be a number, got \"$patience\"" ;;
esac
guests=${GUESTS:-/run/hibergated-guests}
[ -d "$guests" ] || mkdir -m 0700 "$guests" || fail "make the directory $guests"
socket=$guests/$name.qmp
pidfile=$guests/$name.pid
"$command" "$@"
