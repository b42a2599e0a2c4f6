#!/bin/sh
# deployment.sh launch|ready|stop
#
# Wakes a Kubernetes Deployment and puts it to sleep by its scale subresource, with the token of the pod that this runs
# in. It needs a POSIX shell, curl, tr and sed, and writes no file.
#
#   launch  sets the replicas to REPLICAS if they are 0; those that somebody else has set are left alone
#   ready   ends with 0 if the Service has a ready endpoint, with 1 if it has none (yet)
#   stop    sets the replicas to 0, and returns when the Service has no endpoint left, not even a terminating one
#
# DEPLOYMENT    name of the Deployment
# SERVICE       name of the Service in front of its pods, to which the gate connects; DEPLOYMENT by default
# REPLICAS      1 by default
# NAMESPACE     the one of this pod by default
# STOP_WAIT     seconds that stop waits for the pods at most; 60 by default
# REQUEST_TIME  seconds that one request may take; 10 by default
#
# KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are those that each pod has. Without them the API server is
# looked up as kubernetes.default.svc.
set -eu

account=${SERVICEACCOUNT:-/var/run/secrets/kubernetes.io/serviceaccount}

fail() {
	printf 'deployment.sh: %s\n' "$*" >&2
	exit 2
}

# number NAME VALUE: dies unless it is a number.
number() {
	case $2 in
	'' | *[!0-9]*) fail "$1 must be a number, got \"$2\"" ;;
	esac
}

# name NAME VALUE: dies unless it can be the name of an object. It becomes part of a URL.
name() {
	case $2 in
	'' | *[!a-z0-9.-]* | [.-]*) fail "$1 must be the name of a Kubernetes object, got \"$2\"" ;;
	esac
}

# request METHOD PATH [BODY]: sets $code to the HTTP status and $body to the answer without any space.
# The token goes through standard input, as arguments can be seen by all; and it is read again each time,
# as the kubelet replaces it long before it expires.
request() {
	token=$(cat "$account/token") || fail "read the token of the service account"
	method=$1
	path=$2
	set -- --silent --show-error --config - --cacert "$account/ca.crt" --max-time "$wait" --request "$method" \
		--header 'Accept: application/json' --write-out '\n%{http_code}' --url "https://$server$path" ${3+--data "$3"}
	answer=$(printf 'header = "Authorization: Bearer %s"\nheader = "Content-Type: application/merge-patch+json"\n' "$token" |
		curl "$@") || fail "$method $path: no answer of $server"
	code=${answer##*
}
	body=$(printf '%s' "${answer%?"$code"}" | tr -d '\n\r\t')
}

# refused METHOD PATH: dies with what the API server said, which is a Status object.
refused() {
	said=$(printf '%s' "$body" | sed -n 's/.*"message": *"\(.*\)", *"reason".*/\1/p' | sed 's/\\"/"/g')
	fail "$1 $2: $code ${said:-$body}"
}

# endpoints: sets $body to the slices of the Service.
endpoints() {
	request GET "$slices"
	[ "$code" = 200 ] || refused GET "$slices"
	body=$(printf '%s' "$body" | tr -d ' ')
}

launch() {
	tries=5
	while :; do
		request GET "$scale"
		[ "$code" = 200 ] || refused GET "$scale"
		object=$(printf '%s' "$body" | tr -d ' ')
		# Replicas that are 0 are left out of "spec".
		replicas=$(printf '%s' "$object" | sed -n 's/.*"spec":{"replicas":\([0-9]*\)}.*/\1/p')
		[ "${replicas:-0}" = 0 ] || return 0
		version=$(printf '%s' "$object" | sed -n 's/.*"resourceVersion":"\([^"\\]*\)".*/\1/p')
		[ -n "$version" ] || fail "GET $scale: the answer has no resourceVersion"
		# The version makes sure that what was seen is what is changed.
		request PATCH "$scale" "{\"metadata\":{\"resourceVersion\":\"$version\"},\"spec\":{\"replicas\":$count}}"
		case $code in
		200) return 0 ;;
		409) # somebody else was faster
			tries=$((tries - 1))
			[ "$tries" -gt 0 ] || refused PATCH "$scale"
			;;
		*) refused PATCH "$scale" ;;
		esac
	done
}

ready() {
	endpoints
	case $body in
	*'"ready":true'*) return 0 ;;
	esac
	exit 1
}

stop() {
	request PATCH "$scale" '{"spec":{"replicas":0}}'
	[ "$code" = 200 ] || refused PATCH "$scale"
	left=$patience
	while :; do
		endpoints
		case $body in
		*'"addresses":['*) ;;
		*) return 0 ;;
		esac
		[ "$left" -gt 0 ] || fail "the Service $service still has endpoints, $patience s after $deployment was scaled to 0"
		left=$((left - 1))
		sleep 1
	done
}

deployment=${DEPLOYMENT:-}
service=${SERVICE:-$deployment}
count=${REPLICAS:-1}
patience=${STOP_WAIT:-60}
wait=${REQUEST_TIME:-10}
namespace=${NAMESPACE:-}
if [ -z "$namespace" ]; then
	namespace=$(cat "$account/namespace") || fail "read the namespace of this pod; set NAMESPACE"
fi
name DEPLOYMENT "$deployment"
name SERVICE "$service"
name NAMESPACE "$namespace"
number REPLICAS "$count"
number STOP_WAIT "$patience"
number REQUEST_TIME "$wait"
[ "$count" -gt 0 ] || fail "REPLICAS must be at least 1"

host=${KUBERNETES_SERVICE_HOST:-kubernetes.default.svc}
case $host in
*:*) host="[$host]" ;;
esac
server=$host:${KUBERNETES_SERVICE_PORT:-443}
scale=/apis/apps/v1/namespaces/$namespace/deployments/$deployment/scale
slices="/apis/discovery.k8s.io/v1/namespaces/$namespace/endpointslices?labelSelector=kubernetes.io/service-name%3D$service"

case ${1:-} in
launch | ready | stop) "$1" ;;
*) fail "usage: deployment.sh launch|ready|stop" ;;
esac
