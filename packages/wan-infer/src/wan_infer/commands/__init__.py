"""One module a command; each adds its arguments to a parser and runs."""
