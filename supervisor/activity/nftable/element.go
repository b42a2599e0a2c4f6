package nftable

import (
	"bytes"
	"encoding/binary"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

// Element is one element of a set, as a dump tells it.
type Element struct {
	Key     []byte // aliases the message
	Packets uint64 // of its counter
	Bytes   uint64
	Left    time.Duration // until the element times out
	Timed   bool          // Left is there
}

// nftaSetElemExpressions is NFTA_SET_ELEM_EXPRESSIONS: several expressions in one element.
const nftaSetElemExpressions = 11

// DecodeElements calls each with every element in the body of an NFT_MSG_NEWSETELEM
// message. It allocates nothing. Pure.
func DecodeElements(body []byte, each func(Element)) error {
	if len(body) < 4 {
		return netlink.ErrMalformed
	}
	message := netlink.Attributes{Rest: body[4:]} // after struct nfgenmsg
	for message.Next() {
		if message.Type != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		list := netlink.Attributes{Rest: message.Value}
		for list.Next() {
			e, err := decodeElement(list.Value)
			if err != nil {
				return err
			}
			each(e)
		}
		if err := list.Err(); err != nil {
			return err
		}
	}
	return message.Err()
}

func decodeElement(b []byte) (Element, error) {
	var e Element
	as := netlink.Attributes{Rest: b}
	for as.Next() {
		switch as.Type {
		case unix.NFTA_SET_ELEM_KEY:
			key := netlink.Attributes{Rest: as.Value}
			for key.Next() {
				if key.Type == unix.NFTA_DATA_VALUE {
					e.Key = key.Value
				}
			}
			if err := key.Err(); err != nil {
				return e, err
			}
		case unix.NFTA_SET_ELEM_EXPIRATION:
			if len(as.Value) != 8 {
				return e, netlink.ErrMalformed
			}
			ms := min(binary.BigEndian.Uint64(as.Value), math.MaxInt64/uint64(time.Millisecond))
			e.Left, e.Timed = time.Duration(ms)*time.Millisecond, true
		case unix.NFTA_SET_ELEM_EXPR:
			if err := e.decodeExpression(as.Value); err != nil {
				return e, err
			}
		case nftaSetElemExpressions:
			list := netlink.Attributes{Rest: as.Value}
			for list.Next() {
				if err := e.decodeExpression(list.Value); err != nil {
					return e, err
				}
			}
			if err := list.Err(); err != nil {
				return e, err
			}
		}
	}
	return e, as.Err()
}

// decodeExpression takes the figures of a counter; other expressions are not ours.
func (e *Element) decodeExpression(b []byte) error {
	counter := false
	as := netlink.Attributes{Rest: b}
	for as.Next() {
		switch {
		case as.Type == unix.NFTA_EXPR_NAME:
			counter = bytes.Equal(as.Value, []byte("counter\x00"))
		case as.Type == unix.NFTA_EXPR_DATA && counter:
			figures := netlink.Attributes{Rest: as.Value}
			for figures.Next() {
				if len(figures.Value) != 8 {
					continue
				}
				switch n := binary.BigEndian.Uint64(figures.Value); figures.Type {
				case unix.NFTA_COUNTER_BYTES:
					e.Bytes = n
				case unix.NFTA_COUNTER_PACKETS:
					e.Packets = n
				}
			}
			if err := figures.Err(); err != nil {
				return err
			}
		}
	}
	return as.Err()
}
