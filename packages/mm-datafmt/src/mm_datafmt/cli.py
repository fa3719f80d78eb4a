"""The command ``mm-datafmt``. What does the work is imported by the command that needs it, so ``--help`` is quick."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from .commands import check, head, preview, stats
from .commands.numbers import natural, positive
from .errors import DataFormatError
from .interrupting import interrupted_later

if TYPE_CHECKING:
    from .report import Report

_EXIT_CODES = "exit codes: 0 done, 1 check found problems, 2 usage or input error, 3 internal error, 130 interrupted"
# Held here as well, so that --help needs not import the formats; a test compares.
FORMAT_NAMES = (
    *("llava", "sharegpt", "alpaca", "openai", "messages"),
    *("coco_captions", "coco_boxes", "coco_classes", "coco_counts"),
)
WRITTEN_FORMATS = FORMAT_NAMES[:5]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's arguments) and return its exit code."""
    try:
        options = _parser().parse_args(argv)
        with interrupted_later():  # half imported, it takes the process down
            import orjson  # noqa: F401
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
    from .conversion import can_go_on

    try:
        report = _converted(options)
    except KeyboardInterrupt:
        if not can_go_on(options.target):
            raise
        print("interrupted; the same command with --resume goes on from there", file=sys.stderr)
        return 130
    outcome = f"wrote {report.written} to {options.target}"
    if report.validation:
        outcome = (
            f"wrote {report.written - report.validation} to {options.target} and {report.validation} for validation"
        )
    if report.bad_records:
        outcome += f", rejected {report.rejected}, repaired {report.repaired}"
    print(f"{report.describe()}; {outcome}" if report.ok else f"{report.describe()}\n{outcome}", file=sys.stderr)
    return 0


def _converted(options: argparse.Namespace) -> Report:
    from .conversion import convert
    from .sources import Source

    return convert(
        [Source.named(name) for name in options.sources],
        options.target,
        image_dir=options.image_dir,
        dataset_dir=options.dataset_dir,
        source_format=options.source_format,
        target_format=options.target_format,
        seed=options.seed,
        shuffle=options.shuffle,
        max_samples=options.max_samples,
        val_ratio=options.val_ratio,
        on_bad=options.on_bad,
        max_bad_ratio=options.max_bad_ratio,
        media=options.media,
        boxes=options.boxes,
        image_max_pixels=options.image_max_pixels,
        resume=options.resume,
        overwrite=options.overwrite,
        data_json=options.data_json,
        workers=options.workers or len(os.sched_getaffinity(0)),
        on_format=_announce(options, options.sources),
        progress=True,
    )


def _announce(options: argparse.Namespace, sources: Sequence[str]) -> Callable[[str], None]:
    how = "detected" if options.source_format is None else "given by --from"
    names: Iterator[str] = iter(sources)

    def announce(name: str) -> None:
        print(f"{next(names)}: format {name} ({how})", file=sys.stderr, flush=True)

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
    for command in (check, preview, stats, head):
        command.add(commands)
    return parser


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "convert",
        help="write a data set in the messages format",
        description="Convert each SRC (a JSON array, JSON lines, both also as .gz or .zst, parquet, or COCO "
        "annotations) to one DST, a JSON array, or JSON lines if its name ends in .jsonl. Every record is checked "
        "first. DST appears when it is complete; with --on_bad error, only if no record has a problem.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    command.add_argument(
        "sources",
        metavar="SRC[=WEIGHT]",
        nargs="+",
        help="a file to convert; with weights, sources are mixed in this proportion until one is used up",
    )
    command.add_argument("target", metavar="DST", help="the file to write")
    _add_format(command)
    command.add_argument(
        "--to",
        dest="target_format",
        choices=WRITTEN_FORMATS,
        default="messages",
        help="the format to write (default: %(default)s)",
    )
    command.add_argument(
        "--image_dir", metavar="DIR", help="what paths in SRC are relative to (default: folder of SRC)"
    )
    command.add_argument(
        "--dataset_dir",
        metavar="DIR",
        help="what paths in DST are relative to, the trainer's dataset_dir (default: folder of DST)",
    )
    command.add_argument(
        "--media",
        choices=("verify", "exists", "none"),
        default="verify",
        help="open and verify every image, look whether it exists, or do not look (default: %(default)s)",
    )
    command.add_argument(
        "--boxes",
        metavar="FROM:TO",
        default="",
        help="convert the boxes in questions and answers; each one of pixels (Qwen2.5-VL), resized (the same, in the "
        "picture that the model sees), qwen2_vl (0 to 1000), coco (corner, width, height)",
    )
    command.add_argument(
        "--image_max_pixels",
        metavar="N",
        type=natural,
        default=262144,
        help="for resized: as in the trainer's data.json; 0 if it has no such step (default: %(default)s)",
    )
    _add_choice(command)
    command.add_argument(
        "--on_bad",
        choices=("error", "skip", "repair"),
        default="error",
        help="write nothing if a record has a problem, leave it out, or mend it where possible; the latter two list "
        "them in DST's .bad.jsonl (default: %(default)s)",
    )
    command.add_argument(
        "--max_bad_ratio", metavar="R", type=float, help="write nothing if a larger share was left out (default: any)"
    )
    command.add_argument("--resume", action="store_true", help="go on with an interrupted conversion")
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    command.add_argument(
        "--data_json", metavar="FILE", help="also write MindSpeed MM's data.json, its dataset_dir right for DST"
    )
    command.add_argument(
        "--workers", metavar="N", type=natural, default=0, help="processes that convert (default: one for each CPU)"
    )
    command.set_defaults(run=_convert)


def _add_choice(command: argparse.ArgumentParser) -> None:
    """Add what decides which records come, and in which order."""
    command.add_argument("--shuffle", action="store_true", help="shuffle the records of all sources")
    command.add_argument(
        "--seed", type=int, default=0, help="of the shuffle and of the validation records (default: %(default)s)"
    )
    command.add_argument(
        "--max_samples", metavar="N", type=positive, help="stop after N written records (default: all)"
    )
    command.add_argument(
        "--val_ratio", metavar="R", type=float, default=0.0, help="share of the records that go to DST's .val file"
    )


def _add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from",
        dest="source_format",
        choices=FORMAT_NAMES,
        help="the format of the input (default: told from its first records)",
    )
