"""The command line. One file per command; only `console` knows the terminal."""
