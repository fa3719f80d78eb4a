"""``mm-finetune export``: a checkpoint of a run as a Hugging Face folder, or as PEFT's adapter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "run", type=Path, help="folder of a run, or one of its checkpoints: run/checkpoint/iter_0000500"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    adapter = parser.add_mutually_exclusive_group()
    adapter.add_argument("--merge", action="store_true", help="of a run with adapters: add them to the base's weights")
    adapter.add_argument("--adapter", action="store_true", help="of a run with adapters: PEFT's folder")
    parser.add_argument("--hf_dir", type=Path, help="configuration and tokenizer (default: the run's model.hf_dir)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")


def run(args: argparse.Namespace) -> int:
    """Export."""
    from mm_finetune.export import export

    what = "merged" if args.merge else "adapter" if args.adapter else "model"
    folder = export(args.run, args.output, what=what, hf_dir=args.hf_dir, overwrite=args.overwrite)  # type: ignore[arg-type]
    sys.stdout.write(f"exported {'adapter' if args.adapter else 'model'}: {folder}\n")
    return 0
