package supervisor

import (
	"net/netip"
	"sync"
	"time"

	"hibergate/activation"
)

// source is whom a limit for each source counts: an IPv4 address, an IPv6 prefix, a user
// of a Unix socket. The zero value: nobody in particular, who has no limit.
type source struct {
	prefix netip.Prefix
	uid    uint32
	unix   bool
}

// sources counts what each source of a service with accept = true has at the moment. Serve
// asks it outside the loop. A nil *sources admits everybody.
type sources struct {
	limits *Limits

	mu     sync.Mutex // held for one look-up
	all    map[source]*sourceUse
	forgot time.Time // when forget was called last
}

// sourceUse is what one source has.
type sourceUse struct {
	open int
	rate bucket
}

// sourceLimit says which limit a connection is above.
type sourceLimit uint8

const (
	withinLimits sourceLimit = iota
	tooMany                  // limits.max_connections_per_source
	tooFast                  // limits.accept_rate_per_source
)

// maxSources bounds what strangers can make us remember. Above it, who is new shares one account.
const maxSources = 1 << 16

func newSources(l *Limits) *sources {
	if l.MaxConnectionsPerSource == 0 && l.AcceptRatePerSource.Count == 0 {
		return nil
	}
	return &sources{limits: l, all: map[source]*sourceUse{}}
}

// of says who a peer is.
func (s *sources) of(peer *activation.Peer) source {
	if addr := peer.Remote.Addr().Unmap().WithZone(""); addr.IsValid() {
		bits := addr.BitLen()
		if addr.Is6() {
			bits = s.limits.SourcePrefix
		}
		p, _ := addr.Prefix(bits) // bits are in range
		return source{prefix: p}
	}
	if peer.Known {
		return source{uid: peer.UID, unix: true}
	}
	return source{}
}

// admit counts a connection, unless it is above a limit. What it admits must be released.
func (s *sources) admit(now time.Time, peer *activation.Peer) (source, sourceLimit) {
	if s == nil {
		return source{}, withinLimits
	}
	who := s.of(peer)
	if who == (source{}) {
		return who, withinLimits
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	use := s.all[who]
	if use == nil {
		if len(s.all) >= maxSources && now.Sub(s.forgot).Abs() >= time.Second {
			s.forget(now) // not for each of thousands of strangers
		}
		if len(s.all) >= maxSources {
			who = source{unix: true, uid: 1<<32 - 1} // nobody's uid
		}
		if use = s.all[who]; use == nil {
			use = &sourceUse{}
			s.all[who] = use
		}
	}
	if most := s.limits.MaxConnectionsPerSource; most > 0 && use.open >= most {
		return who, tooMany
	}
	switch use.rate.fill(now, s.limits.AcceptRatePerSource) {
	case -1:
	case 0:
		return who, tooFast
	default:
		use.rate.take(1)
	}
	use.open++
	return who, withinLimits
}

// release gives back what admit counted.
func (s *sources) release(who source) {
	if s == nil || who == (source{}) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	use := s.all[who]
	if use == nil {
		return
	}
	use.open--
	if use.open == 0 && s.limits.AcceptRatePerSource.Count == 0 {
		delete(s.all, who)
	}
}

// forget drops those who have nothing and whose rate says nothing any more.
func (s *sources) forget(now time.Time) {
	s.forgot = now
	for who, use := range s.all {
		if use.open == 0 && use.rate.fill(now, s.limits.AcceptRatePerSource) >= s.limits.AcceptRatePerSource.Count {
			delete(s.all, who)
		}
	}
}
