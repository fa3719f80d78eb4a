"""``schema``: print the JSON Schema of what this tool writes or reads."""

from __future__ import annotations

import argparse
from typing import Any

from ascend_envcheck.commands.terminal import show

KINDS = ("snapshot", "report", "explain", "rules")


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("schema", help="print the JSON Schema of snapshots, reports, explanations or rules")
    parser.add_argument("kind", nargs="?", choices=KINDS, default="report", help="of what (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the schema."""
    import json

    from ascend_envcheck.schema import schema

    show(json.dumps(schema(options.kind), indent=2) + "\n")
    return 0
