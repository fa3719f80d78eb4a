"""``mm-finetune mini``: make a tiny Qwen2.5-VL and a data set of real pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("directory", type=Path, help="folder to make: hf/, data/, train.yaml")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--digits", type=int, metavar="N", help="handwritten digits to train on (default: all)")
    parser.add_argument("--heldout_digits", type=int, default=300, metavar="N", help="and to hold out (default: 300)")
    parser.add_argument("--family", default="qwen2_5_vl", help="model: qwen2_5_vl or qwen2_vl (default: qwen2_5_vl)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this command made")


def run(args: argparse.Namespace) -> int:
    """Make the folder."""
    from transformers.utils import logging

    from mm_finetune.mini import make

    logging.disable_progress_bar()  # it writes even where nobody looks
    folder = make(
        args.directory,
        seed=args.seed,
        digits=args.digits,
        heldout_digits=args.heldout_digits,
        family=args.family,
        overwrite=args.overwrite,
        progress=True,
    )
    sys.stdout.write(f"made {folder}: model hf/, data data/, configuration train.yaml\n")
    return 0
