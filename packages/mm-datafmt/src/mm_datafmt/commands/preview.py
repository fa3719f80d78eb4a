"""``mm-datafmt preview``: samples as the model will see them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .numbers import natural, positive


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    from ..cli import FORMAT_NAMES

    command = commands.add_parser(
        "preview",
        help="show records as the model will see them",
        description="Show records of FILE (what convert reads) in the template of Qwen2.5-VL: pictures with the size "
        "and tokens after the trainer's resize, token ids, which tokens carry loss (green), what is cut (red).",
        epilog="exit codes: 0 done, 2 usage or input error, 3 internal error, 130 interrupted",
        allow_abbrev=False,
    )
    command.add_argument("source", metavar="FILE", help="the file to look at")
    command.add_argument("--n", metavar="N", type=positive, default=5, help="how many records (default: %(default)s)")
    command.add_argument(
        "--start", metavar="N", type=positive, default=1, help="the first of them (default: %(default)s)"
    )
    command.add_argument(
        "--tokenizer", metavar="DIR", help="a model folder with tokenizer.json (default: texts without ids)"
    )
    command.add_argument("--dataset_dir", metavar="DIR", help="what paths are relative to (default: folder of FILE)")
    command.add_argument(
        "--from",
        dest="source_format",
        choices=FORMAT_NAMES,
        help="the format of the input (default: told from its first records)",
    )
    command.add_argument("--seq_length", metavar="N", type=positive, help="show what a trainer cuts at N tokens")
    command.add_argument(
        "--image_max_pixels",
        metavar="N",
        type=natural,
        default=262144,
        help="as in the trainer's data.json; 0 if it has no such step (default: %(default)s)",
    )
    command.add_argument("--mask_history", action="store_true", help="loss on the last answer only")
    command.add_argument("--train_on_prompt", action="store_true", help="loss on questions, too")
    command.add_argument("--html", metavar="OUT", help="write a page with thumbnails instead")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the records."""
    from ..preview import PreviewOptions, PreviewTokenizer, preview
    from ..preview.terminal import terminal_lines, wants_colour

    if options.tokenizer is None:
        sys.stderr.write("no --tokenizer: texts are shown, token ids and cuts are not\n")
    how = "detected" if options.source_format is None else "given by --from"
    views = preview(
        options.source,
        n=options.n,
        start=options.start,
        tokenizer=None if options.tokenizer is None else PreviewTokenizer(Path(options.tokenizer)),
        options=PreviewOptions(
            seq_length=options.seq_length,
            pixel_cap=options.image_max_pixels or None,
            mask_history=options.mask_history,
            train_on_prompt=options.train_on_prompt,
        ),
        dataset_dir=options.dataset_dir,
        source_format=options.source_format,
        on_format=lambda name: sys.stderr.write(f"{options.source}: format {name} ({how})\n"),
    )
    if options.html is not None:
        from ..appearing import appearing
        from ..preview.page import page

        folder = Path(options.source).parent if options.dataset_dir is None else Path(options.dataset_dir)
        with appearing(Path(options.html), overwrite=options.overwrite) as file:
            file.writelines(part.encode() for part in page(views, folder, Path(options.source).name))
        return 0
    colour, encoding = wants_colour(sys.stdout), sys.stdout.encoding or "utf-8"
    for view in views:
        for line in terminal_lines(view, colour=colour):
            sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return 0
