"""One conversion at a time for each output."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TargetError, shown
from .interrupting import interrupted_later
from .writer import part_of

_HELD: set[str] = set()  # of this process, which the system would let in a second time


@contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Keep others from writing ``target`` while the context is open.

    The lock is the system's, on a file beside ``target``: it is gone when the process is, however that ended. Forked
    processes do not inherit it. Raises :class:`TargetError` if another one is at work.
    """
    path = part_of(target, "lock")
    name = os.path.realpath(path)
    if name in _HELD:
        raise _taken(target)
    file = None
    try:
        with interrupted_later():
            file = _locked(path, target)
            _HELD.add(name)
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # before it is given free: who waits for it has to look again
            _HELD.remove(name)
            os.close(file)


def _locked(path: Path, target: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BlockingIOError:
            os.close(file)
            raise _taken(target) from None
        os.close(file)  # its owner has removed it meanwhile


def _taken(target: Path) -> TargetError:
    return TargetError(f"another conversion is writing {shown(str(target), 300)}; wait for it, or name another output")
