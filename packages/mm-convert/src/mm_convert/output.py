"""Finish or leave nothing: a folder appears under its name when it is complete, not before."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from mm_convert.errors import OutputExistsError

# One of these stands in every folder that this package writes; no other folder is ever replaced.
MARKS = ("latest_checkpointed_iteration.txt", "config.json")


def check_free(target: Path, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse a target that may not be written.

    Args:
        target: the folder to make; an empty one is free.
        overwrite: whether a checkpoint that stands there may be replaced.
        sources: folders that are read, and must outlive the writing.

    Raises:
        OutputExistsError: it is occupied, no checkpoint, or holds a source.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise OutputExistsError(f"{target} exists and is not empty; choose another folder or add --overwrite")
    if not any((target / mark).is_file() for mark in MARKS):
        raise OutputExistsError(f"{target} is no checkpoint, so it is not replaced; choose another folder")
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise OutputExistsError(f"{target} can't be replaced: {source}, which is read, stands in it")


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its place on success, and goes away on any error."""
    check_free(target, overwrite=overwrite)
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
