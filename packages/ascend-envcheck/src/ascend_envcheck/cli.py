"""``ascend-envcheck check | snapshot | list``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Sequence

from ascend_envcheck import __version__
from ascend_envcheck.errors import EnvcheckError, SnapshotError
from ascend_envcheck.judge import check, choose
from ascend_envcheck.output import write_new
from ascend_envcheck.probes import IMPORT_SECONDS, collect
from ascend_envcheck.render import as_text
from ascend_envcheck.rules import RULES
from ascend_envcheck.snapshot import Snapshot

FIT, UNFIT, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0 fit, 1 a FAIL was found (or with --strict a WARN), 2 a wrong call or input, 3 a fault of this tool,
        130 interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has seen enough; without this, Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE
    except (EnvcheckError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # noqa: BLE001 - the edge of the command: a fault of ours has its own exit code
        traceback.print_exc()
        return INTERNAL


def _check(options: argparse.Namespace) -> int:
    rules = choose(options.only, options.skip)
    if options.source is not None:
        snapshot = _read(options.source)
    else:
        snapshot = _collect(options, import_torch=any(rule.needs_import for rule in rules))
    report = check(snapshot, only=options.only, skip=options.skip)
    _print(report.to_json() if options.json else as_text(report, snapshot))
    return report.exit_code(strict=options.strict)


def _snapshot(options: argparse.Namespace) -> int:
    if options.output is not None and options.output.exists() and not options.overwrite:
        write_new(options.output, "", overwrite=False)  # refuses before the seconds of probing, not after
    text = _collect(options, import_torch=True).to_json()
    if options.output is None:
        _print(text)
    else:
        write_new(options.output, text, overwrite=options.overwrite)
    return FIT


def _list(options: argparse.Namespace) -> int:
    _print("".join(f"{rule.id:<16}  {rule.title}\n" for rule in RULES))
    return FIT


def _read(path: Path) -> Snapshot:
    try:
        return Snapshot.from_json(path.read_text(encoding="utf-8"))
    except (SnapshotError, UnicodeDecodeError) as error:
        raise SnapshotError(f"{path}: {error}") from error


def _collect(options: argparse.Namespace, *, import_torch: bool) -> Snapshot:
    shown = sys.stderr.isatty()

    def progress(step: str) -> None:
        if shown:
            print(f"\r\x1b[K{step} …", end="", file=sys.stderr, flush=True)

    try:
        return collect(import_torch=import_torch, import_seconds=options.import_seconds, progress=progress)
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="backslashreplace").decode(encoding))


def _ids(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds between 0 and 86400")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ascend-envcheck",
        description="Is this machine fit to fine-tune Qwen2.5-VL, on an Ascend NPU or without one?",
        epilog="exit status: 0 fit, 1 a FAIL was found (with --strict: or a WARN), 2 wrong call, 3 internal error",
    )
    parser.add_argument("--version", action="version", version=f"ascend-envcheck {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_check(commands)
    _add_snapshot(commands)
    listing = commands.add_parser("list", help="print the ids of the rules, with a line each")
    listing.set_defaults(run=_list)
    return parser


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("check", help="judge this machine, or a snapshot of another one")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--only", type=_ids, default=[], metavar="ID,…", help="run these rules only")
    parser.add_argument("--skip", type=_ids, default=[], metavar="ID,…", help="run all rules but these")
    parser.add_argument("--strict", action="store_true", help="a WARN makes the exit status 1 too")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="judge this snapshot")
    _add_import_seconds(parser)
    parser.set_defaults(run=_check)


def _add_snapshot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("snapshot", help="write down what is here, to be judged elsewhere")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write; standard output by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    _add_import_seconds(parser)
    parser.set_defaults(run=_snapshot)


def _add_import_seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import_seconds",
        type=_seconds,
        default=IMPORT_SECONDS,
        metavar="N",
        help="time limit for importing torch in a child process (default: %(default)g)",
    )
