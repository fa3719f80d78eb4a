"""What can be read as a log, as blocks of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Iterable, Iterator, Union

from ascend_envcheck.errors import LogError

Source = Union[str, bytes, Iterable[str], IO[str], IO[bytes]]
BLOCK = 1 << 20  # bytes read at a time
_SAMPLE = 8192  # bytes that tell text from binary


def blocks(source: Source) -> Iterator[bytes]:
    """The text of a log, its lines, or an open file, as UTF-8 in blocks of about a megabyte."""
    if isinstance(source, (str, bytes)):
        for at in range(0, len(source), BLOCK):
            yield _bytes(source[at : at + BLOCK])
    elif hasattr(source, "read"):
        block = source.read(BLOCK)
        while block:
            yield _bytes(block)
            block = source.read(BLOCK)
    else:
        yield from _gathered(source)


def logs_at(path: Path) -> list[Path]:
    """The file itself, or all ``*.log`` of a folder and its folders (that of plog), in the order of their names.

    Raises:
        LogError: the folder has none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(log for log in path.rglob("*.log") if log.is_file())
    if not found:
        raise LogError(f"no *.log is in {path} or its folders; give the folder of plog, or a file")
    return found


def open_log(path: Path) -> IO[bytes]:
    """The log, open at its start.

    Raises:
        LogError: it is not text.
        OSError: it can't be read.
    """
    log = path.open("rb")
    if b"\0" in log.read(_SAMPLE):
        log.close()
        raise LogError(f"{path} is not text; unpack it first, for instance: zcat {path} | ascend-envcheck explain -")
    log.seek(0)
    return log


def _gathered(lines: Iterable[str]) -> Iterator[bytes]:
    waiting: list[bytes] = []
    size = 0
    for line in lines:
        waiting.append(_bytes(line if line.endswith("\n") else line + "\n"))
        size += len(waiting[-1])
        if size > BLOCK:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", errors="replace") if isinstance(text, str) else bytes(text)
