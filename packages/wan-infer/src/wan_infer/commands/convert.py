"""Turn a checkpoint folder of the original layout into that of diffusers, or back, bit for bit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("source", type=Path, help="a checkpoint folder of either layout")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--to", choices=("original", "diffusers"), required=True, help="the layout to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it is a checkpoint")
    parser.add_argument("--shard_size", type=float, default=5.0, help="GB of a safetensors file at most (default: 5)")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Convert, and return what was done."""
    from wan_infer.checkpoints.convert import convert

    done = convert(
        options.source,
        options.target,
        to=options.to,
        overwrite=options.overwrite,
        shard_size=int(options.shard_size * 1e9),
    )
    for note in done.notes:
        sys.stderr.write(f"note: {note}\n")
    sys.stderr.write(f"{done.target}: {done.tensors} tensors, {done.size / 1e6:,.1f} MB, {done.layout} layout\n")
    return {
        "target": str(done.target),
        "layout": done.layout,
        "tensors": done.tensors,
        "bytes": done.size,
        "notes": list(done.notes),
    }
