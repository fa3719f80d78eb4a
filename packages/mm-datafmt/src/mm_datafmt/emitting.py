"""Decoded values become encoded records of the target format; in this process or, in order, in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple

import orjson

from .errors import RecordError
from .formats import Format
from .judging import Judge
from .sources import Step
from .splitting import decode_run


class Outcome(NamedTuple):
    """What became of ``read`` values: encoded records and their indices; of each bad one index, reasons, whether it
    was mended; how many records had a field without a place, by field.
    """

    read: int
    records: list[bytes]
    indices: list[int]
    bad: list[tuple[int, list[RecordError], bool]]
    lost: Counter[str]


class Emitter:
    """Judges the values of each source and encodes the samples as ``target`` writes them."""

    def __init__(self, judges: Sequence[Judge], target: Format) -> None:
        self._judges = judges
        self._target = target

    def __call__(self, source: int, values: Sequence[object]) -> Outcome:
        """Return what becomes of ``values``, which come from input number ``source``."""
        judge, emit, lost, dumps = self._judges[source], self._target.emit, self._target.lost, orjson.dumps
        outcome = Outcome(len(values), [], [], [], Counter())
        for index, value in enumerate(values):
            sample, faults = judge(value)
            if sample is not None:
                try:
                    outcome.records.append(dumps(emit(sample)))
                except RecordError as fault:
                    sample, faults = None, [*faults, fault.with_traceback(None)]
                except TypeError as error:  # nested too deeply, or half a surrogate pair in a field of the record
                    sample, faults = None, [*faults, RecordError(f"cannot be written: {error}", code="not_carried")]
                else:
                    outcome.indices.append(index)
                    for name in lost(sample):
                        outcome.lost[name] += 1
            if faults:
                outcome.bad.append((index, faults, sample is not None))
        return outcome


def outcomes(emitter: Emitter, steps: Iterator[Step], workers: int) -> Iterator[tuple[Step, Outcome]]:
    """Yield each step with its outcome, in order.

    With several ``workers`` the work is done in forked processes; the text of a run is sent, not its values. A worker
    has one run at a time, so neither side can wait for the other with a full pipe, and it ends when its pipe does, even
    if this process is killed.
    """
    if workers <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        for step in steps:
            yield step, emitter(step.source, step.run.values)
        return
    context = multiprocessing.get_context("fork")
    pipes: list[tuple[Connection, Connection]] = [context.Pipe() for _ in range(workers)]
    processes = [context.Process(target=_work, args=(emitter, pipes, number), daemon=True) for number in range(workers)]
    busy: deque[tuple[Connection, Step]] = deque()
    try:
        with _interrupted_later():
            for process in processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()
        for number, step in enumerate(steps):
            if len(busy) == workers:
                yield _answered(*busy.popleft())
            connection = pipes[number % workers][0]
            connection.send((step.source, *_shipped(step)))
            busy.append((connection, step))
        while busy:
            yield _answered(*busy.popleft())
    finally:
        for ours, _ in pipes:
            ours.close()
        for process in processes:
            if process.pid is not None:  # it was started
                process.terminate()
                process.join()


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block: in a fork it would be lost, or raised in the child as well."""
    if threading.current_thread() is not threading.main_thread():  # it is not raised here
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            signal.raise_signal(signal.SIGINT)


def _shipped(step: Step) -> tuple[bytes, str, list[object] | None]:
    run = step.run
    if run.layout == "rows" or any(isinstance(value, RecordError) for value in run.values):
        return b"", run.layout, run.values
    return run.text, run.layout, None


def _answered(connection: Connection, step: Step) -> tuple[Step, Outcome]:
    answer = connection.recv()
    if isinstance(answer, BaseException):
        raise answer
    return step, answer


def _work(emitter: Emitter, pipes: Sequence[tuple[Connection, Connection]], number: int) -> None:
    """Answer until the pipe ends. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other, (ours, theirs) in enumerate(pipes):
        ours.close()
        if other != number:
            theirs.close()
    connection = pipes[number][1]
    while True:
        try:
            source, text, layout, values = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            connection.send(emitter(source, decode_run(text, layout) if values is None else values))
        except BrokenPipeError:
            os._exit(0)
        except Exception as error:  # noqa: BLE001 - raised again where it can be shown
            connection.send(error)
