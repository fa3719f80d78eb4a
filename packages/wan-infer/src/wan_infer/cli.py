"""``wan-infer --prompt …`` makes a video; ``wan-infer convert`` turns a checkpoint into the other layout."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

from wan_infer.commands import convert, generate
from wan_infer.errors import NumericsError, ProcessError, WanError


def build_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser of the command itself, and that of ``convert``."""
    parser = argparse.ArgumentParser(
        prog="wan-infer",
        description="Generate a video with Wan2.1. Without --ckpt_dir, with the small model that this package carries.",
        epilog="wan-infer convert --help: the original layout of a checkpoint to that of diffusers, and back.",
    )
    generate.add_arguments(parser)
    converter = argparse.ArgumentParser(prog="wan-infer convert", description=convert.__doc__)
    convert.add_arguments(converter)
    return parser, converter


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. Of several processes, the first speaks for all; the others do when they lose one, or by a defect.

    Exit code 0: done, 1: the latents are not finite, 2: bad input, 3: a defect of ours, 130: interrupted.
    """
    with ExitStack() as silence:
        if os.environ.get("RANK", "0") != "0":
            nowhere = silence.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        except ProcessError as error:
            silence.close()
            print(f"wan-infer: error: {error}", file=sys.stderr)
            return 2
        except (WanError, OSError) as error:
            print(f"wan-infer: error: {error}", file=sys.stderr)
            return 1 if isinstance(error, NumericsError) else 2
        except KeyboardInterrupt:
            print("wan-infer: interrupted; nothing that looks finished was left", file=sys.stderr)
            return 130
        except Exception:  # noqa: BLE001  # the edge of the command: a defect of ours, shown whole
            silence.close()
            traceback.print_exc()
            return 3


def _run(arguments: list[str]) -> int:
    parser, converter = build_parsers()
    converts = arguments[:1] == ["convert"]
    options = converter.parse_args(arguments[1:]) if converts else parser.parse_args(arguments)
    result = convert.run(options) if converts else generate.run(options)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0
