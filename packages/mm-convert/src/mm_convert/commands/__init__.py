"""The command line's subcommands, one subject a file; each is imported when it is typed."""
