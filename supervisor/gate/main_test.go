package gate

import (
	"os"
	"testing"

	"hibergate/activation/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }
