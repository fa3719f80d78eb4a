"""Files that grow under a temporary name, can be continued, and appear when they are complete."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from .errors import FolderError, ResumeError, TargetError, shown

JOURNAL = "journal"


def require_writable(target: Path, *, overwrite: bool) -> None:
    """Raise :class:`TargetError` or :class:`FolderError` if ``target`` cannot or may not be written."""
    if not target.parent.is_dir():
        raise FolderError(f"cannot write {shown(str(target), 300)}: its folder does not exist; create it first")
    if target.exists() and not target.is_file():
        raise TargetError(f"{shown(str(target), 300)} exists and is not a file; name another output")
    if target.exists() and not overwrite:
        raise TargetError(f"{shown(str(target), 300)} exists already; add --overwrite to replace it")


def part_of(target: Path, suffix: str = "part") -> Path:
    """Return the name beside ``target`` under which it grows."""
    return target.with_name(f".{target.name}.{suffix}")


def between_records(target: Path) -> bytes:
    """Return what stands between the records of ``target``, each of which is a line."""
    return b"\n" if target.suffix == ".jsonl" else b",\n"


class RecordFile:
    """One output: a JSON array, one record a line, or JSON lines if its name ends in ``.jsonl``.

    ``size`` bytes of an interrupted attempt are kept, 0 to begin anew. UTF-8, not ASCII-escaped. Raises
    :class:`ResumeError` if the attempt is not there.
    """

    def __init__(self, target: Path, *, size: int = 0, overwrite: bool = False) -> None:
        self.target = target
        self._overwrite = overwrite
        self._part = part_of(target)
        self._by_lines = target.suffix == ".jsonl"
        self.between = between_records(target)
        if size and (not self._part.is_file() or self._part.stat().st_size < size):
            raise ResumeError(f"nothing to go on from: {self._part} is missing or too short; run without --resume")
        self._open = ExitStack()
        self._file: BinaryIO
        self.size = size

    def open(self) -> None:
        """Begin, or go on; from here on there may be something that :meth:`remove` removes."""
        self._file = self._open.enter_context(self._part.open("r+b" if self.size else "wb"))
        self._file.truncate(self.size)
        self._file.seek(self.size)

    def write(self, records: bytes) -> None:
        """Append encoded records, :attr:`between` standing between them, if there are any."""
        if not records:
            return
        if not self._by_lines:
            self.size += self._file.write(self.between if self.size else b"[\n")
        self.size += self._file.write(records)
        if self._by_lines:
            self.size += self._file.write(b"\n")

    def flush(self) -> None:
        """Let the disk have everything."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Complete the file and give it its name, as :meth:`complete` and :meth:`appear` do."""
        self.complete()
        self.appear()

    def complete(self) -> None:
        """Write the end, and let the disk have everything; the name is still the temporary one."""
        if not self._by_lines:
            self._file.write(b"\n]\n" if self.size else b"[]\n")
        self.flush()
        self.close()

    def appear(self) -> None:
        """Give the complete file its name. Raises :class:`TargetError` if that was taken meanwhile."""
        require_writable(self.target, overwrite=self._overwrite)
        self._part.replace(self.target)

    def close(self) -> None:
        """Stop; what was written stays under the temporary name."""
        self._open.close()

    def remove(self) -> None:
        """Stop, and leave nothing."""
        try:
            self.close()
        finally:  # what a full disk has not taken is not needed
            self._part.unlink(missing_ok=True)
