"""Bytes, rate and time left, for whoever waits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(nbytes: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; nothing elsewhere.

    Args:
        nbytes: all bytes; what is yielded is told how many were done, again and again.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=nbytes, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update
