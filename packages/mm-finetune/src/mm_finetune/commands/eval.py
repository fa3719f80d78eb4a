"""``mm-finetune eval``: let a Hugging Face model answer a data set; under torchrun on several devices."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm_finetune.commands.train import leave_it_to_the_first

METRICS = ("auto", "exact", "anls", "relaxed", "choice")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--hf_dir", type=Path, required=True, help="Hugging Face folder of the model")
    parser.add_argument(
        "--data", type=Path, required=True, help="records that end with the right answer, or a TSV file of VLMEvalKit"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dataset_dir", type=Path, help="what pictures are relative to (default: folder of --data)")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default="auto",
        help="exact match, ANLS (DocVQA), relaxed accuracy (ChartQA), choice (AI2D, MMMU); default: by the data",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="records answered together (default: 64)")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer in tokens (default: 8; of a table 128)")
    parser.add_argument("--adapter", type=Path, help="PEFT folder with a LoRA adapter for the model")
    parser.add_argument(
        "--train_config", type=Path, help="train.yaml of a run whose data section limits the size of pictures"
    )
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted evaluation stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace --output, and begin anew")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and say how much is right; 1 if records could not be asked. Rank 0 alone speaks."""
    from transformers.utils import logging

    from mm_finetune.config import load_config
    from mm_finetune.errors import FinetuneError
    from mm_finetune.evaluation.run import evaluate
    from mm_finetune.launch import process_rank

    logging.disable_progress_bar()  # ours is enough
    rank, _ = process_rank()
    try:
        evaluation = evaluate(
            args.hf_dir,
            args.data,
            args.output,
            dataset_dir=args.dataset_dir,
            metric=args.metric,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            limits=load_config(args.train_config).data if args.train_config else None,
            adapter=args.adapter,
            resume=args.resume,
            overwrite=args.overwrite,
            progress=True,
            tell=_tell if rank == 0 else None,
        )
    except (FinetuneError, OSError) as error:
        return leave_it_to_the_first(rank, error)
    if rank == 0:
        sys.stdout.write(f"{evaluation.describe()}\nanswers: {args.output}\n")
    return 1 if evaluation.failures else 0


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
