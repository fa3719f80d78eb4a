"""Work done ahead in threads, handed out in the order in which it was asked for.

A thread can't be stopped from outside. One that takes too long is therefore left behind: its result is thrown away
whenever it comes, another thread takes its place, and as a daemon it doesn't keep the process alive. What it holds
(a file, the memory of a picture) stays taken until it returns.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.1  # how often a result that is late is asked for: also how fast a signal is answered
CLOSE_SECONDS = 2.0  # that closing waits for work in progress


class LateError(Exception):
    """A piece of work took longer than it may; the thread was left behind."""


@dataclass(eq=False)
class _Ticket(Generic[T]):
    number: int
    size: int
    done: threading.Event = field(default_factory=threading.Event)
    started: float | None = None
    left_behind: bool = False  # late: its thread has been replaced
    dropped: bool = False  # nobody will take it
    result: T | None = None
    error: BaseException | None = None


class Prefetcher(Generic[T]):
    """Does ``work(number)`` ahead.

    Args:
        work: called in threads; what it raises is raised by :meth:`take`.
        workers: threads; 0: work is done when it is taken, and can't be late.
        limit: most bytes of results that wait to be taken, as given to :meth:`request`; one result may exceed it.
    """

    def __init__(self, work: Callable[[int], T], *, workers: int, limit: int) -> None:
        self._work, self._limit = work, limit
        self._asked: deque[_Ticket[T]] = deque()  # in the order of taking; the first `_fed` are given to threads
        self._fed = 0
        self._held = 0
        self._queue: SimpleQueue[_Ticket[T] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._workers = workers
        for _ in range(workers):
            self._start()

    def request(self, number: int, size: int) -> None:
        """Ask for a piece of work whose result takes `size` bytes."""
        self._asked.append(_Ticket(number, size))
        self._feed()

    def take(self, timeout: float = 0.0) -> T:
        """The result of the oldest request.

        Args:
            timeout: seconds that the work may take, counted from its start; 0 is no limit.

        Raises:
            LateError: it took longer.
        """
        ticket = self._asked.popleft()
        if not self._workers:
            return self._work(ticket.number)
        try:
            self._wait(ticket, timeout)
        finally:
            self._fed -= 1
            self._held -= ticket.size
            self._feed()
        if ticket.error is not None:
            raise ticket.error
        return ticket.result  # type: ignore[return-value]

    def forget(self) -> None:
        """Drop all requests."""
        for ticket in self._asked:
            ticket.dropped = True
        self._asked.clear()
        self._fed = self._held = 0

    def close(self) -> None:
        """Stop: work that has begun may end, for a moment; none begins."""
        self._closed = True
        self.forget()
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads.clear()

    def _feed(self) -> None:
        while self._workers and self._fed < len(self._asked):
            ticket = self._asked[self._fed]
            if self._held and self._held + ticket.size > self._limit:
                return
            self._held += ticket.size
            self._fed += 1
            self._queue.put(ticket)

    def _wait(self, ticket: _Ticket[T], timeout: float) -> None:
        while not ticket.done.wait(LOOK_SECONDS):
            late = ticket.started is not None and time.monotonic() - ticket.started > timeout
            if timeout and late:
                ticket.left_behind = True
                self._start()
                raise LateError(f"it took more than {timeout:g} s")

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="mm-finetune-data", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        while (ticket := self._queue.get()) is not None and not self._closed:
            if ticket.dropped:
                continue
            ticket.started = time.monotonic()
            try:
                ticket.result = self._work(ticket.number)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that takes the result
                ticket.error = error
            ticket.done.set()
            if ticket.left_behind:
                return  # another thread stands in its place
