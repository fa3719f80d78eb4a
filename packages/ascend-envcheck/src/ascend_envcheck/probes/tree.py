"""File system look-ups beneath a root folder, none of which raises."""

from __future__ import annotations

import os
from pathlib import Path

MAX_BYTES = 64 * 1024
"""A version file has a few lines; what is larger is something else, and its head will do."""


class Tree:
    """A machine's files as they lie beneath ``root``; every path given and returned is the machine's own, as text."""

    def __init__(self, root: str = "/") -> None:
        self.root = Path(root).resolve()

    def real(self, path: str) -> Path:
        """Where a path of the machine lies on this one."""
        return self.root / path.lstrip("/")

    def resolve(self, path: str) -> str | None:
        """What an existing absolute path resolves to, links followed; None when it is not there."""
        if not path.startswith("/"):
            return None
        try:
            target = self.real(path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
            return None
        return f"/{target.relative_to(self.root)}" if self.root in target.parents else str(target)

    def text(self, path: str) -> str | None:
        """The head of a regular file, undecodable bytes replaced; None when it can't be read."""
        try:
            if not self.real(path).is_file():  # opening a pipe would wait for ever
                return None
            with self.real(path).open("rb") as file:
                return file.read(MAX_BYTES).decode("utf-8", errors="replace")
        except (OSError, ValueError):
            return None

    def names(self, folder: str) -> tuple[str, ...]:
        """The names in a folder, sorted; none when it can't be read."""
        try:
            return tuple(sorted(entry.name for entry in self.real(folder).iterdir()))
        except (OSError, ValueError):
            return ()

    def may_use(self, path: str) -> bool:
        """Whether this user may read and write a path."""
        return os.access(self.real(path), os.R_OK | os.W_OK)
