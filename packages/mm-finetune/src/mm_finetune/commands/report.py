"""``mm-finetune report``: a run and its evaluations as one HTML file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run: config.yaml and metrics.jsonl")
    parser.add_argument("--before", type=Path, required=True, help="what eval wrote before the run")
    parser.add_argument("--after", type=Path, required=True, help="what eval wrote after the run")
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument(
        "--attach", type=Path, nargs="+", default=[], metavar="FILE", help="more .png pictures and .mp4 videos to show"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from mm_finetune.report import write_report

    report = write_report(
        args.run_dir,
        before=args.before,
        after=args.after,
        output=args.output,
        attach=args.attach,
        overwrite=args.overwrite,
    )
    sys.stdout.write(
        f"exactly right: {report.before.accuracy:.1%} -> {report.after.accuracy:.1%}; page: {args.output}\n"
    )
    return 0
