"""``python -m ascend_envcheck`` is the command ``ascend-envcheck``."""

import sys

from ascend_envcheck.cli import main

if __name__ == "__main__":
    sys.exit(main())
