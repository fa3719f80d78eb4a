"""The command ``mm-datafmt``."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence

from .errors import DataFormatError
from .formats import FORMATS
from .pipeline import check, convert

_EXIT_CODES = "exit codes: 0 done, 1 check found problems, 2 usage or input error, 3 internal error, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's arguments) and return its exit code."""
    try:
        options = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    except (DataFormatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001 - a defect of ours: shown in full, with an exit code of its own
        traceback.print_exc()
        return 3


def _convert(options: argparse.Namespace) -> int:
    report = convert(
        options.source,
        options.target,
        image_dir=options.image_dir,
        dataset_dir=options.dataset_dir,
        source_format=options.source_format,
        overwrite=options.overwrite,
        on_format=_announce(options),
        progress=True,
    )
    print(f"{report.describe()}; wrote {options.target}", file=sys.stderr)
    return 0


def _check(options: argparse.Namespace) -> int:
    report = check(
        options.source,
        dataset_dir=options.dataset_dir,
        source_format=options.source_format,
        on_format=_announce(options),
        progress=True,
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.describe())
    return 0 if report.ok else 1


def _announce(options: argparse.Namespace) -> Callable[[str], None]:
    how = "detected" if options.source_format is None else "given by --from"

    def announce(name: str) -> None:
        print(f"{options.source}: format {name} ({how})", file=sys.stderr)

    return announce


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mm-datafmt",
        description="Turn image conversations into the messages/images JSON of MindSpeed MM, and check them.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_check(commands)
    return parser


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "convert",
        help="write a data set in the messages format",
        description="Convert SRC (a JSON array or JSON lines) to DST, one JSON array in the messages format. "
        "Every record is checked first; if one has a problem, DST is not written.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    command.add_argument("source", metavar="SRC", help="the file to convert")
    command.add_argument("target", metavar="DST", help="the file to write")
    command.add_argument(
        "--image_dir", metavar="DIR", help="what paths in SRC are relative to (default: folder of SRC)"
    )
    command.add_argument(
        "--dataset_dir",
        metavar="DIR",
        help="what paths in DST are relative to, the trainer's dataset_dir (default: folder of DST)",
    )
    _add_format(command)
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    command.set_defaults(run=_convert)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "check",
        help="check every record of a data set and its images",
        description="Check every record of FILE (a JSON array or JSON lines) and every image it names.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    command.add_argument("source", metavar="FILE", help="the file to check")
    command.add_argument(
        "--dataset_dir",
        metavar="DIR",
        help="what paths in FILE are relative to (default: folder of FILE)",
    )
    _add_format(command)
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_check)


def _add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from",
        dest="source_format",
        choices=tuple(FORMATS),
        help="the format of the input (default: told from its first record)",
    )
