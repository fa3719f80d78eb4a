"""Finish or leave nothing: a folder appears under its name when it is complete, not before."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mm_convert.errors import OutputExistsError


def check_free(target: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError if a non-empty target is there and may not be replaced."""
    occupied = (target.is_dir() and any(target.iterdir())) or (target.exists() and not target.is_dir())
    if occupied and not overwrite:
        raise OutputExistsError(f"{target} exists and is not empty; choose another folder or add --overwrite")


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
        shutil.rmtree(scratch, ignore_errors=True)
