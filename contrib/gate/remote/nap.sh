#!/bin/sh
# nap.sh is all that the key of hibergated may do at the machine that sleeps. In ~root/.ssh/authorized_keys there, on one line:
#
#   restrict,from="192.168.1.2",command="/usr/local/sbin/nap.sh" ssh-ed25519 AAAA... hibergated
#
# and in sshd_config "PermitRootLogin forced-commands-only", if root may not log in otherwise.
set -eu
case ${SSH_ORIGINAL_COMMAND:-} in
suspend | hibernate | poweroff)
	# In a second, so that the connection is over by then.
	exec systemd-run --quiet --collect --on-active=1s --timer-property=AccuracySec=100ms systemctl "$SSH_ORIGINAL_COMMAND"
	;;
esac
echo "nap.sh: suspend, hibernate or poweroff; nothing else" >&2
exit 1
