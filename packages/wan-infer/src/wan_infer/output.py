"""Files that are complete or not there: they grow under a temporary name and are renamed at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


def require_writable(target: Path, *, overwrite: bool) -> None:
    """Raise :class:`OutputError` if `target` cannot or may not be written."""
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if target.exists() and not target.is_file():
        raise OutputError(f"{target} exists and is not a file; name another output")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already; name another output, or add --overwrite (overwrite=True)")


@contextmanager
def write_errors(target: Path, *also: type[Exception]) -> Iterator[None]:
    """Turn what the file system says inside the block, and the errors `also`, into :class:`OutputError`."""
    kinds: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except OutputError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write {target}: {reason}; nothing was left behind") from error


class PartialFile:
    """An empty file beside `target`, which becomes `target` when it is complete.

    Attributes:
        path: where to write until then.

    Raises:
        OutputError: the target may not be written, or nothing can be created beside it.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        require_writable(target, overwrite=overwrite)
        self.path = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp").absolute()
        self._target = target
        self._overwrite = overwrite
        with write_errors(target):
            self.path.touch(exist_ok=False)

    def complete(self) -> None:
        """Give the file its name, once the disk has it.

        Raises:
            OutputError: the disk did not take all of it, or the target has appeared meanwhile.
        """
        with write_errors(self._target):
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
            require_writable(self._target, overwrite=self._overwrite)
            self.path.replace(self._target)

    def discard(self) -> None:
        """Remove the file, unless it is complete."""
        self.path.unlink(missing_ok=True)
