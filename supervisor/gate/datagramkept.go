package gate

import "time"

// keptBytes is how much of what was sent to destinations is kept at a time, for all clients of a gate
// together; keptTime is for how long. A destination that is not there refuses at once, or after a round trip.
const (
	keptBytes = maxDatagram
	keptTime  = time.Second
)

// keptDatagrams is a ring of the bytes that were sent last, so that a datagram that turns out to be refused can be sent
// again. What is new overwrites what is oldest. The zero value is ready to use.
type keptDatagrams struct {
	ring []byte // nil or of keptBytes
	end  uint64 // how many bytes were ever put in
}

// keptDatagram is the place of one datagram in the ring. The zero value has none.
type keptDatagram struct {
	from  uint64 // the number of its first byte
	size  int
	at    time.Time // when it was sent
	valid bool
}

// put keeps a copy of b, which is at most maxDatagram long.
func (k *keptDatagrams) put(b []byte, now time.Time) keptDatagram {
	if k.ring == nil {
		k.ring = make([]byte, keptBytes)
	}
	d := keptDatagram{from: k.end, size: len(b), at: now, valid: true}
	n := copy(k.ring[k.end%keptBytes:], b)
	copy(k.ring, b[n:])
	k.end += uint64(len(b))
	return d
}

// holds says whether a datagram is still there.
func (k *keptDatagrams) holds(d keptDatagram) bool { return d.valid && k.end-d.from <= keptBytes }

// read copies a datagram that is still there into b, and returns that part of b.
func (k *keptDatagrams) read(d keptDatagram, b []byte) []byte {
	b = b[:d.size]
	n := copy(b, k.ring[d.from%keptBytes:])
	copy(b[n:], k.ring)
	return b
}
