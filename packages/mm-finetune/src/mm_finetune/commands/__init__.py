"""One file a subcommand, each with ``add_arguments`` and ``run``; nothing heavy is imported before ``run``."""
