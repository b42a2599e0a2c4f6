// Package config turns TOML into validated services.
//
// [Load] reads a file or a directory and returns either every service it
// describes or every [Problem] it has, each with the line it stands on. One table
// of keys (schema.go, options.go) drives the decoding, the suggestions for misspelt
// keys and the [Reference].
//
// It opens no socket, looks up no user and starts nothing: what can change between
// now and the start of a service is checked at the start. Nothing of the text is
// kept after Load.
package config
