package config

import (
	"math"
	"time"

	"hibergate/activation"
)

// Limits of the kernel: include/net/tcp.h, and half of what SO_RCVBUF and
// F_SETPIPE_SZ take, because the kernel doubles or rounds up.
const (
	maxKeepAlive  = 32767 * time.Second
	maxProbes     = 127
	maxBuffer     = 1 << 30
	maxWait       = math.MaxInt32 * time.Second
	maxUint32     = math.MaxUint32
	maxPermission = 0o777
)

func listenKeys() []key {
	const (
		tcp    = forTCP
		ip     = forTCP | forUDP
		stream = forTCP | forUnix | forUnixpacket
		local  = forUnix | forUnixgram | forUnixpacket
		paths  = local | forFIFO | withPath
		all    = ip | local
	)
	opts := func(d *decoder) *activation.Options { return &d.socket.spec.Options }
	return []key{
		{
			"address", "address", "required", "as \"tcp://:8080\", \"udp://[::1]:53\", \"unix:///run/x.sock\", \"unix:@name\", \"fifo:///run/x\"; with `handoff = \"adopt\"` also \"tcp://localhost:80\" and \"auto\"", 0,
			(*decoder).address,
		},
		{
			"name", "string", "the name of the service", "the name of the socket in `LISTEN_FDNAMES`", 0,
			(*decoder).socketName,
		},
		{
			"type", `"stream", "dgram" or "seqpacket"`, "as the address says", "makes a `unix:` address a unixgram or unixpacket socket", 0,
			func(d *decoder, raw any) { d.choice(raw, &d.socket.kind, "stream", "dgram", "seqpacket") },
		},
		{
			"backlog", "integer", "`net.core.somaxconn`", "how many connections wait in the queue at most", stream,
			func(d *decoder, raw any) { d.integer(raw, 1, math.MaxInt32, &opts(d).Backlog) },
		},
		{
			"family", `"default", "dual", "ipv4" or "ipv6"`, `"default"`, "which IP versions an address without an IP serves; default: as `net.ipv6.bindv6only` says, and with `handoff = \"adopt\"` as the program binds it", ip,
			(*decoder).family,
		},
		{
			"device", "string", "every interface", "the network interface it is bound to", ip,
			(*decoder).device,
		},
		{
			"reuse_port", "boolean", "false", "lets other sockets have the same address (SO_REUSEPORT)", ip,
			func(d *decoder, raw any) { d.boolean(raw, &opts(d).ReusePort) },
		},
		{
			"free_bind", "boolean", "false", "binds to an address that the machine does not have yet (IP_FREEBIND)", ip,
			func(d *decoder, raw any) { d.boolean(raw, &opts(d).FreeBind) },
		},
		{
			"transparent", "boolean", "false", "takes connections to foreign addresses (IP_TRANSPARENT)", ip,
			func(d *decoder, raw any) { d.boolean(raw, &opts(d).Transparent) },
		},
		{
			"broadcast", "boolean", "false", "permits broadcast datagrams (SO_BROADCAST)", forUDP,
			func(d *decoder, raw any) { d.boolean(raw, &opts(d).Broadcast) },
		},
		{
			"keepalive", "boolean", "false", "probes silent connections (SO_KEEPALIVE)", tcp,
			func(d *decoder, raw any) { d.boolean(raw, &opts(d).KeepAlive) },
		},
		{
			"keepalive_time", "duration, whole seconds", "`net.ipv4.tcp_keepalive_time`", "silence before the first probe", tcp,
			func(d *decoder, raw any) { d.seconds(raw, maxKeepAlive, &opts(d).KeepAliveTime) },
		},
		{
			"keepalive_interval", "duration, whole seconds", "`net.ipv4.tcp_keepalive_intvl`", "time between probes", tcp,
			func(d *decoder, raw any) { d.seconds(raw, maxKeepAlive, &opts(d).KeepAliveInterval) },
		},
		{
			"keepalive_probes", "integer", "`net.ipv4.tcp_keepalive_probes`", "unanswered probes before a connection is given up", tcp,
			func(d *decoder, raw any) { d.integer(raw, 1, maxProbes, &opts(d).KeepAliveProbes) },
		},
		{
			"nodelay", "boolean", "false", "sends small segments at once (TCP_NODELAY)", tcp,
			func(d *decoder, raw any) { d.boolean(raw, &opts(d).NoDelay) },
		},
		{
			"defer_accept", "duration, whole seconds", "off", "wakes for the first data instead of the connection, for this long (TCP_DEFER_ACCEPT)", tcp,
			func(d *decoder, raw any) { d.seconds(raw, maxWait, &opts(d).DeferAccept) },
		},
		{
			"congestion", "string", "`net.ipv4.tcp_congestion_control`", "the congestion control algorithm", tcp,
			func(d *decoder, raw any) { d.text(raw, &opts(d).Congestion) },
		},
		{
			"receive_buffer", "size", "that of the kernel", "SO_RCVBUF", all,
			func(d *decoder, raw any) { d.size(raw, maxBuffer, &opts(d).ReceiveBuffer) },
		},
		{
			"send_buffer", "size", "that of the kernel", "SO_SNDBUF", all,
			func(d *decoder, raw any) { d.size(raw, maxBuffer, &opts(d).SendBuffer) },
		},
		{
			"pipe_size", "size", "that of the kernel", "F_SETPIPE_SZ", forFIFO,
			func(d *decoder, raw any) { d.size(raw, maxBuffer, &opts(d).PipeSize) },
		},
		{
			"mark", "integer", "none", "the firewall mark of its packets (SO_MARK)", ip,
			func(d *decoder, raw any) { d.optional(raw, 0, maxUint32, &opts(d).Mark) },
		},
		{
			"priority", "integer", "none", "SO_PRIORITY", ip,
			func(d *decoder, raw any) { d.optional(raw, 0, math.MaxInt32, &opts(d).Priority) },
		},
		{
			"tos", "integer", "none", "the type of service byte (IP_TOS)", ip,
			func(d *decoder, raw any) { d.optional(raw, 0, 255, &opts(d).TOS) },
		},
		{
			"ttl", "integer", "`net.ipv4.ip_default_ttl`", "the time to live of its packets (IP_TTL)", ip,
			func(d *decoder, raw any) { d.integer(raw, 1, 255, &opts(d).TTL) },
		},
		{
			"pass_credentials", "boolean", "false", "delivers the sender's credentials (SO_PASSCRED)", local,
			func(d *decoder, raw any) { d.boolean(raw, &opts(d).PassCredentials) },
		},
		{
			"mode", "octal string", `"0666"`, "the permissions of the path", paths,
			func(d *decoder, raw any) { d.mode(raw, &opts(d).Mode) },
		},
		{
			"dir_mode", "octal string", `"0755"`, "the permissions of directories that are made for the path", paths,
			func(d *decoder, raw any) { d.mode(raw, &opts(d).DirMode) },
		},
		{
			"owner", "string", "the user of hibergated", "the owner of the path: name or number", paths,
			func(d *decoder, raw any) { d.account(raw, &opts(d).Owner) },
		},
		{
			"group", "string", "the group of hibergated", "the group of the path: name or number", paths,
			func(d *decoder, raw any) { d.account(raw, &opts(d).Group) },
		},
		{
			"symlinks", "array of absolute paths", "none", "symbolic links to the path", paths,
			func(d *decoder, raw any) { d.texts(raw, &opts(d).Symlinks, (*decoder).absolute) },
		},
		{
			"remove_on_stop", "boolean", "false", "removes the path when hibergated ends", paths,
			func(d *decoder, raw any) { d.boolean(raw, &opts(d).RemoveOnStop) },
		},
	}
}
