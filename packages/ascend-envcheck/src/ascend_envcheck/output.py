"""Writes a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ascend_envcheck.errors import OutputExistsError


def write_new(path: Path, text: str, *, overwrite: bool) -> None:
    """Writes text to a new file: under another name beside it, renamed when complete.

    A link stays a link: what it points to is replaced.

    Raises:
        OutputExistsError: the file is there and ``overwrite`` is false, or it is a folder, a device or a pipe.
        OSError: the folder is missing or can't be written to.
    """
    if not overwrite:
        refuse_existing(path)
    if path.exists() and not path.is_file():  # root may rename a file over /dev/null, and break the machine
        raise OutputExistsError(f"{path} is no regular file, and is not replaced; choose another name")
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        if temporary.exists():
            temporary.unlink()
        raise


def refuse_existing(path: Path) -> None:
    """Raise OutputExistsError where there is something already."""
    if path.exists():
        raise OutputExistsError(f"{path} exists; choose another name or give --overwrite")
