package process

// Exec says what to run and in which context. It is immutable and validated by
// the configuration: where Command is not empty its first element is absolute.
type Exec struct {
	Command             []string // program and arguments; no shell
	Argv0               string   // empty: Command[0]
	User, Group         string   // names or numbers; empty: the supervisor's own
	SupplementaryGroups []string // beside those the user is in
	WorkingDirectory    string   // empty: "/"; "~": the user's home
	Environment         []string // "NAME=value"
	PassEnvironment     []string // names of variables of the supervisor's own that are passed on; "*": all of them
	EnvironmentFiles    []string // read at each start, later ones win; a leading "-" allows it to be missing
	UCSPIEnv            bool     // accept = true only: PROTO, TCPREMOTEIP and the rest of the UCSPI variables
}
