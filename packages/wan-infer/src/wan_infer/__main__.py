"""``python -m wan_infer``: the command, in the form that torchrun can start."""

import sys

from wan_infer.cli import main

sys.exit(main())
