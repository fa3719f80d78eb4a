"""Finish or leave nothing: a folder appears under its name when it is complete, not before."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wan_infer.errors import OutputError

# One of these stands in every checkpoint folder; no other folder is ever replaced.
_MARKS = ("config.json", "model_index.json")


def check_free(target: Path, *, overwrite: bool, source: Path) -> None:
    """Refuse a target that may not be written.

    Args:
        target: the folder to make; an empty one is free.
        overwrite: whether a checkpoint that stands there may be replaced.
        source: what is read, and must outlive the writing.

    Raises:
        OutputError: it is occupied, no checkpoint, or lies in the source or around it.
    """
    inner, outer = target.resolve(), source.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise OutputError(f"{target} and {source}, which is read, lie in each other; choose another folder")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"{target} exists and is not empty; choose another folder or add --overwrite")
    if not any((target / mark).is_file() for mark in _MARKS):
        raise OutputError(f"{target} is no checkpoint, so it is not replaced; choose another folder")


def check_space(target: Path, size: int) -> None:
    """Refuse to begin what the disk can't take.

    Raises:
        OutputError: fewer than `size` bytes are free where `target` will be.
    """
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise OutputError(
            f"{target} needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left; make room or choose another"
        )


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its place on success, and goes away on any error."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        (scratch / "new").mkdir()
        yield scratch / "new"
        if target.exists():
            target.rename(scratch / "old")
        (scratch / "new").rename(target)
    finally:
        if (scratch / "old").exists() and not target.exists():
            (scratch / "old").rename(target)
        shutil.rmtree(scratch, ignore_errors=True)
