"""``mm-datafmt check``: every record and every image of a file, before a trainer sees them."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .numbers import positive

if TYPE_CHECKING:
    from ..checking.result import CheckReport

_EXIT_CODES = "exit codes: 0 clean, 1 problems found, 2 usage or input error, 3 internal error, 130 interrupted"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    from ..cli import FORMAT_NAMES

    command = commands.add_parser(
        "check",
        help="check every record of a data set and its images",
        description="Check every record of FILE (what convert reads) and every image it names, and count the tokens "
        "that Qwen2.5-VL spends on each. Images are judged by their headers; no pixel is decoded.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    command.add_argument("source", metavar="FILE", help="the file to check")
    command.add_argument(
        "--dataset_dir", metavar="DIR", help="what paths in FILE are relative to (default: folder of FILE)"
    )
    command.add_argument(
        "--from",
        dest="source_format",
        choices=FORMAT_NAMES,
        help="the format of the input (default: told from its first records)",
    )
    _add_images(command)
    _add_lengths(command)
    _add_policy(command)
    command.add_argument("--html", metavar="FILE", help="also write the report as a page with thumbnails")
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=run)


def _add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--media",
        choices=("header", "exists", "none"),
        default="header",
        help="read the header of every image, look whether it exists, or do not look (default: %(default)s)",
    )
    command.add_argument(
        "--decode", dest="media", action="store_const", const="decode", help="decode every pixel of every image: slow"
    )
    command.add_argument("--min_side", metavar="N", type=positive, help="smallest side of an image in pixels")
    command.add_argument("--max_side", metavar="N", type=positive, help="largest side of an image in pixels")
    command.add_argument("--max_aspect", metavar="R", type=_aspect, help="largest ratio of an image's sides")
    command.add_argument(
        "--workers", metavar="N", type=_natural, help="threads that look at images (default: 0, 4 with --decode)"
    )


def _add_lengths(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seq_length", metavar="N", type=positive, help="the trainer's limit: how many would be cut?")
    command.add_argument(
        "--tokenizer", metavar="DIR", help="the model's folder, to count text exactly (default: text is estimated)"
    )
    command.add_argument(
        "--image_max_pixels",
        metavar="N",
        type=_natural,
        default=262144,
        help="as in the trainer's data.json; 0 if it has no such step (default: %(default)s)",
    )
    command.add_argument(
        "--image_min_pixels",
        metavar="N",
        type=_natural,
        default=0,
        help="as in the trainer's data.json (default: %(default)s)",
    )


def _add_policy(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--on_bad",
        choices=("error", "skip", "repair"),
        default="error",
        help="judge as convert would: each bad record counts, or only those that cannot be mended (repair); the latter "
        "two list them in FILE's .bad.jsonl (default: %(default)s)",
    )
    command.add_argument("--bad_file", metavar="FILE", help="list bad records there, whatever --on_bad is")
    command.add_argument(
        "--max_bad_ratio",
        metavar="R",
        type=_share,
        default=0.0,
        help="share of rejected records with which the exit code still is 0 (default: %(default)s)",
    )
    command.add_argument(
        "--ignore",
        metavar="CODE",
        action="append",
        default=[],
        help="take no notice of faults with this code, such as duplicate_record; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Check, print what was found, and return 0 or 1."""
    from ..checking.lengths import PixelRule
    from ..checking.pictures import SizeLimits
    from ..errors import FormatError
    from ..outputs import bad_path
    from ..pipeline import check

    how = "detected" if options.source_format is None else "given by --from"
    bad_file = options.bad_file
    if bad_file is None and options.on_bad != "error":
        bad_file = bad_path(Path(options.source))
    try:
        pixels = PixelRule(image_max_pixels=options.image_max_pixels or None, image_min_pixels=options.image_min_pixels)
    except ValueError as error:
        raise FormatError(f"--image_max_pixels, --image_min_pixels: {error}") from error
    report = check(
        options.source,
        dataset_dir=options.dataset_dir,
        source_format=options.source_format,
        media=options.media,
        limits=SizeLimits(min_side=options.min_side, max_side=options.max_side, max_aspect=options.max_aspect),
        pixels=pixels,
        tokenizer=options.tokenizer,
        seq_length=options.seq_length,
        on_bad=options.on_bad,
        max_bad_ratio=options.max_bad_ratio,
        ignore=options.ignore,
        bad_file=bad_file,
        html=options.html,
        overwrite=options.overwrite,
        workers=options.workers,
        on_format=lambda name: sys.stderr.write(f"{options.source}: format {name} ({how})\n"),
        progress=True,
    )
    if options.json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    else:
        _print(report)
    return 0 if report.passed else 1


def _print(report: CheckReport) -> None:
    from ..checking.histogram import bins_of, histogram_lines

    plain = not _can_draw()
    columns = min(shutil.get_terminal_size().columns, 100)
    lengths = report.lengths
    lines = histogram_lines(bins_of(lengths.counts), limit=lengths.seq_length, columns=columns, plain=plain)
    sys.stdout.write("\n".join([report.describe(), *lines]) + "\n")


def _can_draw() -> bool:
    try:
        "█▏─".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _number(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
    return value


def _share(text: str) -> float:
    return _number(text, 0, 1)


def _aspect(text: str) -> float:
    return _number(text, 1, 1e9)


def _natural(text: str) -> int:
    return 0 if text == "0" else positive(text)
