"""The commands beside ``convert`` and ``check``, one module each: ``add(subparsers)`` and ``run(options)``."""
