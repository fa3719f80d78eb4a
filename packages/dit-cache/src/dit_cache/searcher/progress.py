"""What a search will cost, and how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A moment of a search.

    Attributes:
        stage: what is measured now.
        done, total: in uncached generations of one sample; `total` is an upper bound.
        eta: seconds that are left by the pace until now; None before anything is done.
    """

    stage: str
    done: float
    total: float
    eta: float | None


Watch = Callable[[Progress], None]


class TerminalWatch:
    """Tells the cost on stderr before anything runs and, where somebody watches, how far the search is, once a second.

    Args:
        announce: the words, with ``{total:.0f}`` where the generations stand.
    """

    def __init__(self, announce: str) -> None:
        self._announce = announce
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        """See `Progress`."""
        if progress.done == 0:
            sys.stderr.write(self._announce.format(total=progress.total) + "\n")
        elif sys.stderr.isatty() and time.monotonic() - self._last > 1:
            self._last = time.monotonic()
            left = "" if progress.eta is None else f", {progress.eta:.0f} s left"
            text = f"{progress.stage}: {progress.done:.0f} of up to {progress.total:.0f}{left}"
            sys.stderr.write(f"\r{text:<78}")
            sys.stderr.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._last:
            sys.stderr.write("\n")


@dataclass(kw_only=True)
class Counter:
    """Counts generations.

    Args:
        watch: is told.
    """

    watch: Watch | None
    _total: float = 0.0
    _done: float = 0.0
    _paid: float = 0.0  # without what was in the journal
    _began: float = field(default_factory=time.monotonic)

    def announce(self, total: float) -> None:
        """Say how many generations will be needed at most."""
        self._total = total
        self._tell("to do")

    def advance(self, stage: str, generations: float, *, paid: bool = True) -> None:
        """Say that so much more is done; `paid` is False where the journal had it."""
        self._done += generations
        self._paid += generations if paid else 0.0
        self._tell(stage)

    def _tell(self, stage: str) -> None:
        if self.watch is not None:
            pace = (time.monotonic() - self._began) / self._paid if self._paid else None
            left = None if pace is None else pace * max(0.0, self._total - self._done)
            self.watch(Progress(stage=stage, done=self._done, total=self._total, eta=left))
