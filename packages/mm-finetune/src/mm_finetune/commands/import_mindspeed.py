"""``mm-finetune import-mindspeed``: a published example of MindSpeed MM as our YAML."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("data", type=Path, metavar="data.json", help="the example's data settings")
    parser.add_argument("model", type=Path, metavar="model.json", help="the example's model settings")
    parser.add_argument("script", type=Path, metavar="script.sh", help="the example's shell script; it is not run")
    parser.add_argument("-o", "--output", type=Path, help="YAML file to write (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")


def run(args: argparse.Namespace) -> int:
    """Write the YAML, and say what is not in it."""
    from mm_finetune.mindspeed import import_example
    from mm_finetune.output import require_free_file, write_file

    output = args.output or Path("train.yaml")
    if args.output:
        require_free_file(output, overwrite=args.overwrite)
    imported = import_example(args.data, args.model, args.script, beside=output)
    if args.output:
        write_file(output, imported.yaml, overwrite=args.overwrite)
        sys.stdout.write(f"wrote {output}: mm-finetune train {output} --print_config\n")
    else:
        sys.stdout.write(imported.yaml)
    sys.stderr.write(imported.describe() + "\n")
    return 0
