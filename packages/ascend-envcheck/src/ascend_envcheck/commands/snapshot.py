"""``snapshot``: write down what is here, to be judged elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ascend_envcheck.commands.facts import add_probing, look_here
from ascend_envcheck.commands.terminal import show


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("snapshot", help="write down what is here, to be judged elsewhere")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write; standard output by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    add_probing(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Look, and write."""
    from ascend_envcheck.output import refuse_existing, write_new

    if options.output is not None and not options.overwrite:
        refuse_existing(options.output)  # before the seconds of probing, not after
    text = look_here(options).to_json()
    if options.output is None:
        show(text)
    else:
        write_new(options.output, text, overwrite=options.overwrite)
    return 0
