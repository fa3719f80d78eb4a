"""``python -m mm_convert``."""

import sys

from mm_convert.cli import main

sys.exit(main())
