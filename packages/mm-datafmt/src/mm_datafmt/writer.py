"""One JSON array on disk, complete or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FolderError, TargetError, shown


def require_writable(target: Path, *, overwrite: bool) -> None:
    """Raise :class:`TargetError` or :class:`FolderError` if ``target`` cannot or may not be written."""
    if not target.parent.is_dir():
        raise FolderError(f"cannot write {shown(str(target), 300)}: its folder does not exist; create it first")
    if target.exists() and not target.is_file():
        raise TargetError(f"{shown(str(target), 300)} exists and is not a file; name another output")
    if target.exists() and not overwrite:
        raise TargetError(f"{shown(str(target), 300)} exists already; add --overwrite to replace it")


@contextmanager
def json_array(target: Path, *, overwrite: bool) -> Iterator[Callable[[dict[str, object]], None]]:
    """Give a function that writes one record; ``target`` appears when the block ends without an error.

    The array is UTF-8, not ASCII-escaped, one record a line. It grows under a temporary name beside ``target``, which
    is removed if anything ends the block early, Ctrl-C included.
    """
    require_writable(target, overwrite=overwrite)
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            separator = "[\n"

            def write(record: dict[str, object]) -> None:
                nonlocal separator
                file.write(separator + json.dumps(record, ensure_ascii=False))
                separator = ",\n"

            yield write
            file.write("[]\n" if separator == "[\n" else "\n]\n")
            file.flush()
            os.fsync(file.fileno())
        require_writable(target, overwrite=overwrite)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
