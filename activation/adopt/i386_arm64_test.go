package adopt

// There is no i386 here.
func lowMemory(bool) []byte              { return nil }
func enterI386(_, _, _, _ uint32) uint32 { panic("no i386") }
