#!/bin/sh
# domain.sh launch DOMAIN    starts a guest of libvirt, from its saved state if it has one, or wakes or resumes it
# domain.sh stop DOMAIN      shuts it down, and returns when it is off
# domain.sh save DOMAIN      saves its memory to disk, and returns when it is off
#
# Each may be called at any time: what is already so is left alone. It needs a POSIX shell and virsh.
#
# CONNECT    URI of libvirt; qemu:///system by default
# STOP_WAIT  seconds that stop gives the guest to shut down; 60 by default. Then it fails, and the guest runs on
set -eu

fail() {
	printf 'domain.sh: %s\n' "$*" >&2
	exit 1
}

v() {
	LC_ALL=C virsh --quiet --connect "${CONNECT:-qemu:///system}" "$@"
}

# state: sets $state.
state() {
	state=$(v domstate "$domain") || fail "ask libvirt for the state of $domain"
}

# off: waits until the guest is off. Status 1 if it is not.
off() {
	left=$patience
	while state && [ "$state" != "shut off" ]; do
		[ "$left" -gt 0 ] || return 1
		left=$((left - 1))
		sleep 1
	done
}

launch() {
	state
	if [ "$state" = "in shutdown" ]; then
		off || fail "$domain is shutting down, and not off after $patience s"
	fi
	case $state in
	running | idle | blocked) ;;
	paused) v resume "$domain" >/dev/null || fail "resume $domain" ;;
	pmsuspended) v dompmwakeup "$domain" >/dev/null || fail "wake $domain" ;;
	"shut off" | crashed) v start "$domain" >/dev/null || fail "start $domain" ;;
	*) fail "$domain is \"$state\", which is nothing it could be woken from" ;;
	esac
}

stop() {
	state
	[ "$state" != "shut off" ] || return 0
	if [ "$state" != "in shutdown" ]; then
		launch # a guest that is paused cannot shut down
		v shutdown "$domain" >/dev/null || fail "shut down $domain"
	fi
	off || fail "$domain is not off after $patience s; does it mind its power button?"
}

save() {
	state
	[ "$state" != "shut off" ] || return 0
	v managedsave "$domain" >/dev/null || fail "save $domain"
}

command=${1:-}
domain=${2:-}
case $command in
launch | stop | save) ;;
*) fail "usage: domain.sh launch|stop|save DOMAIN" ;;
esac
case $domain in
'' | -*) fail "the name of a domain is missing" ;;
esac
patience=${STOP_WAIT:-60}
case $patience in
'' | *[!0-9]*) fail "STOP_WAIT must be a number, got \"$patience\"" ;;
esac
"$command"
