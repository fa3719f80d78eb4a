"""What is written appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mm_finetune.errors import OutputExistsError


def require_free_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a target that may not be written.

    Raises:
        OutputExistsError: it exists and is not to be replaced, or is no file.
        FileNotFoundError: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist; create it first")
    if path.exists() and not path.is_file():
        raise OutputExistsError(f"{path} exists and is not a file; name another output")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already; add --overwrite to replace it")


def require_room(path: Path) -> None:
    """Refuse a folder that can't be made or written into, before the work that ends there begins.

    Raises:
        OutputExistsError: something else stands in its way.
        PermissionError: nothing can be written there.
    """
    found = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not found.is_dir():
        raise OutputExistsError(f"{path} can't be a folder, for {found} is a file; name another one")
    if not os.access(found, os.W_OK | os.X_OK):
        raise PermissionError(f"{found} can't be written to, so {path} can't be there; name another folder")


def write_file(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a file under a temporary name beside it, and rename it when it is complete."""
    require_free_file(path, overwrite=overwrite)
    temporary = _beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_free_folder(path: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    """Refuse a folder that may not be made; one that exists and is empty may.

    Args:
        path: the folder.
        overwrite: whether a folder of ours may be replaced.
        ours: tells a folder that this command made from any other, which is never replaced.

    Raises:
        OutputExistsError: it is not empty and is not to be replaced, or is not ours.
        PermissionError: nothing can be written there.
    """
    require_room(path)
    if not path.exists() or not any(path.iterdir()):
        return
    if not ours(path):
        raise OutputExistsError(f"{path} is not empty and was not made by this command; name another folder")
    if not overwrite:
        raise OutputExistsError(f"{path} is not empty; add --overwrite to replace all of it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends without an error; what was there goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
