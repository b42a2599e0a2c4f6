// Package nftable makes nftables tables, of family inet, that go when their owner does, also when it is killed. What is in
// them is for their users.
package nftable
