"""Which job a worker does next: one that writes no file that another worker is writing.

The system lets one thread at a time write into a file, so that workers at one file wait for each other.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from mm_convert.copying import Job


class JobQueue:
    """Jobs for several workers, each of which iterates over it.

    Args:
        jobs: all of them, in the order in which they are to be done as far as files allow.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._waiting: dict[frozenset[str], deque[tuple[int, Job]]] = {}
        self._busy: Counter[str] = Counter()
        self._lock = threading.Lock()
        for number, job in enumerate(jobs):
            files = frozenset(ref.file for ref in job)
            self._waiting.setdefault(files, deque()).append((number, job))

    def __iter__(self) -> Iterator[Job]:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                files = min(self._waiting, key=self._cost)
                _, job = self._waiting[files].popleft()
                if not self._waiting[files]:
                    del self._waiting[files]
                self._busy.update(files)
            try:
                yield job
            finally:
                with self._lock:
                    self._busy.subtract(files)

    def _cost(self, files: frozenset[str]) -> tuple[int, int]:
        """Workers that would be waited for, then the job's place in the order."""
        return max(self._busy[file] for file in files), self._waiting[files][0][0]
