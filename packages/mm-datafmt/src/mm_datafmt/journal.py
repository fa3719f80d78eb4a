"""What an interrupted conversion needs to go on: a small file beside the temporary ones."""

from __future__ import annotations

import json  # it writes file names that are not Unicode, too
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from .errors import ResumeError

_SAMPLED = 1 << 16


def fingerprint(path: Path) -> list[Any]:
    """Return what tells a source from a changed one: size, time of change, a digest of its first and last 64 KiB."""
    status = path.stat()
    with path.open("rb") as file:
        digest = blake2b(file.read(_SAMPLED), digest_size=16)
        file.seek(max(0, status.st_size - _SAMPLED))
        digest.update(file.read(_SAMPLED))
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, digest.hexdigest()]


def is_complete(path: Path) -> bool:
    """Return whether the journal says that all was converted: what is left is to give files their names."""
    try:
        return bool(json.loads(path.read_bytes())["state"]["complete"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that :meth:`Journal.load` refuses
        return False


class Journal:
    """The state of a conversion under ``settings``, kept in ``path``.

    ``settings`` is everything that the output depends on, as plain JSON types; going on with others is refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))

    def load(self) -> Any:
        """Return the last state that was saved, None if there is none: an interruption may come before the first.

        Raises :class:`ResumeError` for other settings.
        """
        try:
            held = json.loads(self.path.read_bytes())
            settings, state = held["settings"], held["state"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise ResumeError(f"{self.path} is no journal of a conversion; run without --resume") from None
        if settings != self._settings:
            names = sorted(settings.keys() | self._settings.keys())
            changed = [name for name in names if settings.get(name) != self._settings.get(name)]
            raise ResumeError(
                f"cannot go on: {', '.join(changed)} changed since the interruption; "
                "give the same, or run without --resume"
            )
        return state

    def save(self, state: Any) -> None:
        """Replace the state, in one step."""
        temporary = self.path.with_name(f"{self.path.name}.new")
        with temporary.open("wb") as file:
            file.write(json.dumps({"settings": self._settings, "state": state}).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def remove(self) -> None:
        """Forget."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(f"{self.path.name}.new").unlink(missing_ok=True)
