"""``mm-finetune eval``: let a Hugging Face model answer a data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--hf_dir", type=Path, required=True, help="Hugging Face folder of Qwen2.5-VL")
    parser.add_argument("--data", type=Path, required=True, help="records that end with the right answer")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dataset_dir", type=Path, help="what pictures are relative to (default: folder of --data)")
    parser.add_argument("--batch_size", type=int, default=64, help="records answered together (default: 64)")
    parser.add_argument("--max_new_tokens", type=int, default=8, help="longest answer in tokens (default: 8)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and say how much is right."""
    from transformers.utils import logging

    from mm_finetune.evaluate import evaluate

    logging.disable_progress_bar()  # ours is enough
    evaluation = evaluate(
        args.hf_dir,
        args.data,
        args.output,
        dataset_dir=args.dataset_dir,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        overwrite=args.overwrite,
        progress=True,
    )
    sys.stdout.write(f"{evaluation.describe()}\nanswers: {args.output}\n")
    return 0
