"""A file that appears when it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .writer import part_of, require_writable


@contextmanager
def appearing(target: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write to that gets the name ``target`` at the end, and is removed if the block fails.

    Raises :class:`TargetError` or :class:`FolderError` if it may not be written, before and behind the block.
    """
    require_writable(target, overwrite=overwrite)
    part = part_of(target)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        require_writable(target, overwrite=overwrite)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
