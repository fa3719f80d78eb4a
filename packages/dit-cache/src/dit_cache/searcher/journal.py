"""What a search has measured, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_cache.errors import SearchError

_FORMAT = "dit-cache search journal, version 1"


class Journal:
    """Measurements by key, in a file of one JSON value a line when a path is given.

    Args:
        path: an existing file is continued.
        about: what the search is of; a file about something else is refused.

    Raises:
        SearchError: the file is about another search, or cannot be read or written.
    """

    def __init__(self, path: str | Path | None, about: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._known: dict[str, Any] = {}
        self._header = json.dumps({"format": _FORMAT, **about}, sort_keys=True)
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def known(self, keys: Sequence[str]) -> list[Any] | None:
        """Return what was measured under the keys, None unless all of them were."""
        return [self._known[key] for key in keys] if all(key in self._known for key in keys) else None

    def put(self, keys: Sequence[str], values: Sequence[Any]) -> list[Any]:
        """Remember measurements, and return them; they are on the disk when this returns."""
        for key, value in zip(keys, values, strict=True):
            self._known[key] = value
            if self._path is not None:
                self._append(json.dumps([key, value]))
        return list(values)

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SearchError(f"{path} cannot be read as a journal of a search: {error}; name another file") from error
        first, *lines = text.split("\n")
        if not lines and self._header.startswith(first):
            path.unlink()  # the first line was being written when the search was interrupted
            return
        self._compare(path, first)
        try:
            self._known.update(map(json.loads, lines[:-1]))  # the last is empty, or was being written
        except ValueError as error:
            raise SearchError(f"{path} is damaged: {error}; remove it to begin anew") from error
        if lines[-1]:
            path.write_text("\n".join((first, *lines[:-1], "")), encoding="utf-8")

    def _compare(self, path: Path, first: str) -> None:
        wanted = json.loads(self._header)
        try:
            found = json.loads(first)
        except ValueError:
            found = None
        if found != wanted:
            known = found if isinstance(found, dict) else {}
            other = ", ".join(key for key in wanted if known.get(key) != wanted[key])
            raise SearchError(
                f"{path} is the journal of another search (different: {other}); name another file, or remove it"
            )

    def _append(self, line: str) -> None:
        assert self._path is not None, "only a journal with a file is appended to"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                if file.tell() == 0:
                    file.write(self._header + "\n")
                file.write(line + "\n")
        except OSError as error:
            raise SearchError(f"{self._path} cannot be written: {error}") from error
