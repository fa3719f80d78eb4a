"""``mm-finetune report``: a run and its evaluations as one HTML file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run: config.yaml and metrics.jsonl")
    parser.add_argument("--before", type=Path, help="what eval wrote before the run")
    parser.add_argument("--after", type=Path, help="what eval wrote after the run; those of RUN/evals stand between")
    parser.add_argument("--output", type=Path, help="HTML file to write (default: RUN/report.html)")
    parser.add_argument(
        "--attach", type=Path, nargs="+", default=[], metavar="FILE", help="more .png pictures and .mp4 videos to show"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from mm_finetune.report import write_report

    output = args.output or args.run_dir / "report.html"
    report = write_report(
        args.run_dir,
        before=args.before,
        after=args.after,
        output=output,
        attach=args.attach,
        overwrite=args.overwrite,
    )
    shares = [f"{stage.evaluation.accuracy:.1%}" for stage in report.stages]
    words = " -> ".join(dict.fromkeys([shares[0], shares[-1]])) if shares else ""
    what = "exactly right" if not shares or report.stages[-1].evaluation.metric == "exact" else "score"
    sys.stdout.write(f"{what}: {words}; page: {output}\n" if words else f"page: {output}\n")
    return 0
