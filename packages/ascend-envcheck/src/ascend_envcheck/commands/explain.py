"""``explain``: what a failed log says."""

from __future__ import annotations

import argparse
from typing import IO, Any, Iterator

from ascend_envcheck.commands.terminal import add_language, language, progress, show

_STANDARD_INPUT = "-"


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "explain",
        help="say what a failed log means",
        description="Reads logs of any size: of a training run, plog, HCCL, pip, a traceback. Causes are told first, "
        "then what only follows from them.",
        epilog="exit status: 0 explained, or no error in it; 1 there are errors, and all are unknown; 2 wrong call",
    )
    parser.add_argument(
        "logs", nargs="+", metavar="LOG", help="a log, a folder of *.log (plog), or - for standard input"
    )
    parser.add_argument("--json", action="store_true", help="print the explanation as JSON")
    add_language(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Explain, and print.

    Raises:
        LogError: there is no log, or it is not text.
        OSError: it can't be read.
    """
    from ascend_envcheck.explanation import explain_files
    from ascend_envcheck.explanation.result import UNKNOWN
    from ascend_envcheck.explanation.text import render

    paths = _paths(options.logs)
    names = _names(paths)
    with progress() as tell:
        explanation = explain_files(
            zip(names, _opened(paths)),
            progress=lambda name, size: tell(f"{name or paths[0]}: {size >> 20} MB"),
        )
    show(explanation.to_json() if options.json else render(explanation, language(options)))
    return int(explanation.status == UNKNOWN)


def _paths(given: list[str]) -> list[str]:
    from pathlib import Path

    from ascend_envcheck.explanation.sources import logs_at

    return [str(log) for one in given for log in ([one] if one == _STANDARD_INPUT else logs_at(Path(one)))]


def _names(paths: list[str]) -> list[str]:
    """What tells the logs apart: the paths without the folders that they share; one log needs no name."""
    import os
    from pathlib import Path

    if len(paths) == 1:
        return [""]
    folders = [Path(path).absolute().parent for path in paths if path != _STANDARD_INPUT]
    shared = os.path.commonpath(folders) if folders else ""
    return [path if path == _STANDARD_INPUT else os.path.relpath(path, shared) for path in paths]


def _opened(paths: list[str]) -> Iterator[IO[bytes]]:
    """The logs one after the other, each closed when the next is asked for: a folder may hold thousands."""
    import sys
    from pathlib import Path

    from ascend_envcheck.explanation.sources import open_log

    for path in paths:
        if path == _STANDARD_INPUT:
            yield sys.stdin.buffer
        else:
            with open_log(Path(path)) as log:
                yield log
