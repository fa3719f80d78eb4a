"""``mm-datafmt head``: a few records to test the way with."""

from __future__ import annotations

import argparse
import os
import sys

from .numbers import positive


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "head",
        help="copy the first records, or some by chance",
        description="Copy N records of SRC (a JSON array or JSON lines, also packed) as they are, byte for byte, to "
        "try a conversion or a training on. Reading stops behind the first N; records that are no JSON are left out.",
        epilog="exit codes: 0 done, 2 usage or input error, 3 internal error, 130 interrupted",
        allow_abbrev=False,
    )
    command.add_argument("source", metavar="SRC", help="the file to copy from")
    command.add_argument("target", metavar="DST", nargs="?", default="-", help="the file to write (default: -, stdout)")
    command.add_argument("-n", metavar="N", type=positive, default=100, help="how many records (default: %(default)s)")
    command.add_argument("--random", action="store_true", help="any N records instead of the first, in their order")
    command.add_argument("--seed", type=int, default=0, help="which ones --random takes (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Copy the records, and say how many."""
    from ..heads import head

    to_stdout = options.target == "-"
    try:
        taken = head(
            options.source,
            sys.stdout.buffer if to_stdout else options.target,
            options.n,
            random=options.random,
            seed=options.seed,
            overwrite=options.overwrite,
        )
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads our output has seen enough; the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    passed = f", passed over {taken.passed_over} that are not JSON" if taken.passed_over else ""
    sys.stderr.write(f"{options.source}: copied {taken.written} of {options.n} asked for{passed}\n")
    return 0
