"""``python -m dit_ulysses``: the command, in the form that torchrun can start."""

import sys

from dit_ulysses.cli import main

if __name__ == "__main__":
    sys.exit(main())
