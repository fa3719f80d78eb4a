"""Several processes that do an :class:`Emitter`'s work; what comes out, and its order, is the same.

A worker reads its stretch of a plain file itself. Of anything else (packed, a pipe, rows of a table) the text of a run
is sent to it. Encoded records come back through memory that both share.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from .emitting import Emitter, Outcome
from .errors import RecordError
from .interrupting import interrupted_later
from .splitting import Run, decode_run
from .stretches import STRETCH, Stretch

_SLOT = 4 * STRETCH  # bytes of an answer for which there is shared memory
_GARBAGE = 200_000  # objects between two looks for cycles, of which decoded JSON has none

Work = Stretch | Run


class Answer(NamedTuple):
    """The outcome of a piece of work, None if that was not what it was taken for, and its newlines.

    The numbers and lines of a stretch are counted from 1.
    """

    work: Work
    outcome: Outcome | None
    newlines: int


class _Line:
    """What a worker and this process share: a pipe, and memory for two answers, one written while one is read."""

    def __init__(self) -> None:
        self.ours, self.theirs = multiprocessing.get_context("fork").Pipe()
        self.given: deque[tuple[Work, int]] = deque()
        self._slots = [mmap.mmap(-1, _SLOT) for _ in range(2)]
        self._next = 0

    def give(self, source: int, work: Work) -> None:
        """Hand over a piece of work."""
        self.given.append((work, self._next))
        self.ours.send((source, _shipped(work), self._next))
        self._next = 1 - self._next

    def answer(self) -> Answer:
        """Return what became of the oldest piece, or raise what was raised there."""
        work, slot = self.given.popleft()
        answer = self.ours.recv()
        if isinstance(answer, BaseException):
            raise answer
        outcome, newlines, size = answer
        if outcome is not None:
            data = self.ours.recv_bytes() if size is None else self._slots[slot][:size]
            outcome = outcome._replace(data=data)
        return Answer(work, outcome, newlines)

    def serve(self, emitter: Emitter, paths: Sequence[Path]) -> None:
        """Answer until the pipe ends."""
        while True:
            source, work, slot = self.theirs.recv()
            try:
                outcome, newlines = _done(emitter, source, work, paths[source])
            except Exception as error:  # noqa: BLE001 - raised again where it can be shown
                self.theirs.send(error)
            else:
                self._reply(outcome, newlines, self._slots[slot])

    def _reply(self, outcome: Outcome | None, newlines: int, slot: mmap.mmap) -> None:
        if outcome is None:
            self.theirs.send((None, newlines, 0))
            return
        data, brief = outcome.data, outcome._replace(data=b"")
        if len(data) <= len(slot):
            slot[: len(data)] = data
            self.theirs.send((brief, newlines, len(data)))
        else:
            self.theirs.send((brief, newlines, None))
            self.theirs.send_bytes(data)


class Pool:
    """Forked workers, there while the context is open. They end when their pipe does, even if this process is killed.

    ``paths`` are those of the inputs, by number.
    """

    def __init__(self, emitter: Emitter, paths: Sequence[Path], workers: int) -> None:
        self._emitter = emitter
        self._paths = paths
        self._lines = [_Line() for _ in range(workers)]
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> Pool:
        try:
            with interrupted_later():
                self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        for line in self._lines:
            process = context.Process(target=self._work, args=(line,), daemon=True)
            process.start()
            self._processes.append(process)
        for line in self._lines:
            line.theirs.close()

    def __exit__(self, *_: object) -> None:
        for line in self._lines:
            line.ours.close()
        for process in self._processes:
            process.terminate()
            process.join()

    def _work(self, mine: _Line) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
        for line in self._lines:
            line.ours.close()
            if line is not mine:
                line.theirs.close()
        gc.freeze()
        gc.set_threshold(_GARBAGE)
        try:
            mine.serve(self._emitter, self._paths)
        except (EOFError, OSError):  # the parent has no more work, or is no more
            os._exit(0)

    def answers(self, source: int, pieces: Iterator[Work], *, ahead: int) -> Iterator[Answer]:
        """Yield what becomes of each piece of input number ``source``, in order.

        A worker is given ``ahead`` pieces: two, so that it need not wait, or one where pieces are large: then neither
        side can wait for the other with a full pipe.
        """
        busy: deque[_Line] = deque()
        for number, piece in enumerate(pieces):
            line = self._lines[number % len(self._lines)]
            if len(line.given) == ahead:
                yield busy.popleft().answer()
            line.give(source, piece)
            busy.append(line)
        while busy:
            yield busy.popleft().answer()


def _shipped(work: Work) -> Work:
    """Return a run without its values, if they can be had from its text."""
    if isinstance(work, Stretch) or work.layout == "rows" or any(isinstance(v, RecordError) for v in work.values):
        return work
    return work._replace(values=[])


def _done(emitter: Emitter, source: int, work: Work, path: Path) -> tuple[Outcome | None, int]:
    if isinstance(work, Stretch):
        found = work.read(path)
        return (None, 0) if found is None else (emitter(source, found[0]), found[1])
    run = work if work.values else work._replace(values=decode_run(work.text, work.layout))
    return emitter(source, run), 0
