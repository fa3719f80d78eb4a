"""Numbers on the command line."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Return the whole number of at least 1 that ``text`` is; argparse reports anything else with exit code 2."""
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """Return :func:`positive` of ``text``, or 0."""
    return 0 if text == "0" else positive(text)
