"""``mm-finetune train``: train on one process, or on many under torchrun."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# The first process that fails makes torchrun end the others: rank 0 must be it, or its words are never said.
WAITS_SECONDS = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", type=Path, help="YAML file; see mm_finetune.config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example train.lr=1e-4")


def run(args: argparse.Namespace) -> int:
    """Check everything, then train.

    All checks give the same result on every process; rank 0 alone reports them.
    """
    from mm_finetune.config import load_config
    from mm_finetune.errors import FinetuneError
    from mm_finetune.launch import process_rank
    from mm_finetune.training import prepare, train

    rank, world_size = process_rank()
    try:
        prepared = prepare(load_config(args.config, args.overrides), world_size=world_size)
    except (FinetuneError, OSError):
        if rank:
            time.sleep(WAITS_SECONDS)
            return 2
        raise
    folder = train(prepared)
    if rank == 0:
        sys.stdout.write(f"checkpoint: {folder}\n")
    return 0
