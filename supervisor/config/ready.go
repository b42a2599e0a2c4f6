package config

import "hibergate/supervisor"

func readyKeys() []key {
	return []key{
		{
			"type", `"exec", "bind" or "notify"`, "`\"exec\"`, with `handoff = \"adopt\"` `\"bind\"`",
			"when a start is over: as soon as the program is executed; with `handoff = \"adopt\"`, when it has bound its sockets and those with connections listen; " +
				"when it says `READY=1`, see sd_notify(3), which needs `accept = false`", 0,
			(*decoder).readyType,
		},
		{
			"hold", "boolean", "false",
			"true: clients of TCP sockets wait outside the queue of the service until it is ready; needs `handoff = \"adopt\"` and `type = \"notify\"`", 0,
			(*decoder).hold,
		},
	}
}

// readyType reads what makes the service ready.
func (d *decoder) readyType(raw any) {
	var word string
	if d.choice(raw, &word, "exec", "bind", "notify") {
		d.service.Ready.Type = map[string]supervisor.ReadyType{
			"exec": supervisor.ReadyExec, "bind": supervisor.ReadyBind, "notify": supervisor.ReadyNotify,
		}[word]
	}
}

// hold reads whether clients are kept out until the service is ready. It is done by parking them, which another file may
// turn off.
func (d *decoder) hold(raw any) {
	if d.boolean(raw, &d.service.Ready.Hold) && d.service.Ready.Hold {
		d.held = append(d.held, d.here())
	}
}

// checkReady fills in when the service is ready, and checks that against the rest.
func (d *decoder) checkReady(since int, keys map[string]any) {
	s := d.service
	ready, _ := keys["ready"].(map[string]any)
	if ready["type"] == nil && d.adopts() {
		s.Ready.Type = supervisor.ReadyBind
	}
	if d.gates() || d.failed(since, "handoff", "ready.type") {
		return
	}
	switch t := s.Ready.Type; {
	case t == supervisor.ReadyExec && d.adopts():
		d.wrongKey("ready.type", `"exec" does not go with handoff = "adopt": a program that was just executed has bound nothing yet`)
	case t == supervisor.ReadyBind && !d.adopts():
		d.wrongKey("ready.type", `"bind" needs handoff = "adopt": nobody sees what other programs bind`)
	case t == supervisor.ReadyNotify && s.Accept && !d.failed(since, "accept"):
		d.wrongKey("ready.type", `"notify" needs accept = false: with accept = true each process has its connection from the start`)
	}
	switch {
	case !s.Ready.Hold:
	case !d.adopts() || s.Ready.Type != supervisor.ReadyNotify:
		d.wrongKey("ready.hold", `needs handoff = "adopt" and type = "notify"`)
	case !d.has(forTCP):
		d.wrongKey("ready.hold", "is for %s, and there is none", forTCP)
	}
}

// checkHeld checks what needs parking against the rest of the configuration.
func (d *decoder) checkHeld() {
	for _, at := range d.held {
		if d.config.Global.NoParking {
			d.source = at.source
			d.wrongAt(at.path, at.path, `needs parking, which is "off" in [hibergated]`)
			d.other(d.hibergatedIn, "hibergated", "parking")
		}
	}
}
