#!/bin/sh
# The show of `make demo`: a service wakes, answers, and sleeps again. It needs
# no root, and removes what it made.
#   run.sh HIBERGATED HELLO [PORT]
set -eu
hibergated=$1 hello=$2 port=${3:-8080}
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
daemon=
finish() {
	trap - EXIT INT TERM
	[ -z "$daemon" ] || { kill "$daemon" 2>/dev/null || true; wait "$daemon" || true; }
	rm -rf "$dir"
}
trap finish EXIT
trap 'exit 0' INT TERM

printf '[hibergated]\ncontrol = "%s"\nstate = "%s"\n\n' "$dir/control.sock" "$dir/state" >"$dir/demo.toml"
sed -e "s|@HELLO@|$hello|" -e "s|:8080|:$port|g" "$here/demo.toml" >>"$dir/demo.toml"
say() { printf '\n# %s\n' "$*"; }
status() { echo "\$ hibergated status"; "$hibergated" --control "$dir/control.sock" status; }
url=http://127.0.0.1:$port/

say "The configuration. hello is a web server that opens its port by itself, and knows nothing of hibergated:"
cat "$here/demo.toml"
say "hibergated listens; no process runs."
"$hibergated" run --config "$dir/demo.toml" &
daemon=$!
tries=0
until "$hibergated" --control "$dir/control.sock" status >/dev/null 2>&1; do
	kill -0 "$daemon" 2>/dev/null || exit 1
	tries=$((tries + 1)); [ $tries -lt 100 ] || exit 1
	sleep 0.05
done
status
say "The first client wakes the service, and is answered by it."
"$hello" get "$url"
status
say "Nobody uses it for 2 seconds, so it is put to sleep."
sleep 3
status
say "The next client wakes it again."
"$hello" get "$url"
if [ -t 1 ]; then
	say "Your turn. In a second terminal:"
	echo "    curl $url"
	echo "    $hibergated --control $dir/control.sock status hello"
	echo "    $hibergated --control $dir/control.sock sleep hello"
	echo "Ctrl-C ends the demo."
	wait "$daemon"
fi
