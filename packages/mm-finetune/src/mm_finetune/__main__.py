"""``python -m mm_finetune``, also under torchrun."""

import sys

from mm_finetune.cli import main

if __name__ == "__main__":
    sys.exit(main())
