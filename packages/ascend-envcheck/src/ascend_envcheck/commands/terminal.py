"""Talking to the person at the terminal."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Callable, Iterator

from ascend_envcheck.messages import LANGUAGES, language_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def show(text: str) -> None:
    """Write to standard output, whatever its encoding.

    Raises:
        OSError: it is closed (``>&-``), or full.
    """
    if sys.stdout is None:
        raise OSError("standard output is closed")
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="backslashreplace").decode(encoding))


def may_colour() -> bool:
    """Whether standard output is a terminal that shows colours, and whose user has not declined them (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def add_language(parser: argparse.ArgumentParser) -> None:
    """Declare ``--lang``."""
    parser.add_argument("--lang", choices=LANGUAGES, help="language of the text; that of LANG by default")


def language(options: argparse.Namespace) -> str:
    """The language that was asked for, else that of the environment."""
    return str(options.lang or language_of(os.environ))


def progress() -> AbstractContextManager[Callable[[str], None]]:
    """A line on a terminal that says what is waited for, and is gone at the end; silent elsewhere."""
    from contextlib import contextmanager

    @contextmanager
    def line() -> Iterator[Callable[[str], None]]:
        shown = sys.stderr.isatty()

        def tell(step: str) -> None:
            if shown:
                _draw(f"{step} …")

        try:
            yield tell
        finally:
            if shown:
                _draw("")

    return line()


def _draw(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()
