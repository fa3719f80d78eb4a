"""What becomes of the records of all inputs, in their order: found in this process, or in several."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .emitting import Emitter, Outcome
from .errors import ParseError
from .inputs import Input
from .sources import Step, cursor_of, in_sequence, state_of
from .splitting import Cursor, Run
from .stretches import Stretch, stretches

if TYPE_CHECKING:
    from .workers import Pool

OnBytes = Callable[[int], object]


class Done(NamedTuple):
    """The outcome of a stretch of input number ``source``; the state to go on from behind it.

    ``again(most)`` finds it once more, until ``most`` records are written.
    """

    source: int
    outcome: Outcome
    state: list[Any]
    again: Callable[[int], Outcome]


def one_by_one(emitter: Emitter, steps: Iterator[Step]) -> Generator[Done, None, None]:
    """Yield what becomes of each step."""
    for step in steps:
        again = partial(emitter, step.source, step.run)
        yield Done(step.source, again(), step.state, again)


def in_order(
    emitter: Emitter, inputs: Sequence[Input], state: Sequence[Any] | None, on_bytes: OnBytes | None, workers: int
) -> Generator[Done, None, None]:
    """Yield what becomes of the inputs in turn, from ``state`` on; the work is done by so many processes."""
    inputs = [replace(source, checked=False) for source in inputs]  # the emitter looks
    if workers <= 1 or not hasattr(os, "fork"):
        yield from one_by_one(emitter, in_sequence(inputs, state, on_bytes))
        return
    from .workers import Pool

    first, cursor = (0, None) if state is None else (state[0], cursor_of(state[1]))
    with Pool(emitter, [source.path for source in inputs], workers) as pool:
        for number in range(first, len(inputs)):
            if inputs[number].can_be_cut:
                yield from _told(_by_place(emitter, pool, number, inputs[number], cursor), on_bytes)
            else:
                yield from _by_text(emitter, pool, number, inputs[number], cursor, on_bytes)
            cursor = None


def _told(dones: Iterator[Done], on_bytes: OnBytes | None) -> Iterator[Done]:
    """Tell ``on_bytes`` how far reading has come."""
    read = 0
    for done in dones:
        offset = cursor_of(done.state[1]).offset
        if on_bytes is not None:
            on_bytes(offset - read)
        read = offset
        yield done


def _by_text(
    emitter: Emitter, pool: Pool, number: int, source: Input, cursor: Cursor | None, on_bytes: OnBytes | None
) -> Iterator[Done]:
    runs = source.runs(cursor, on_bytes=on_bytes)
    for answer in pool.answers(number, runs, ahead=1):
        run, outcome, _ = answer
        assert isinstance(run, Run) and outcome is not None, "a run is what it is"  # noqa: PT018 - one thing
        yield Done(number, outcome, state_of(number, run.end), partial(emitter, number, run))


def _by_place(emitter: Emitter, pool: Pool, number: int, source: Input, cursor: Cursor | None) -> Iterator[Done]:
    """Read here until cuts can be guessed, then by stretches until one is not what it was taken for, and so on."""
    until = 0
    with source.path.open("rb") as file:
        guesses = partial(stretches, file.fileno(), source.kind)
        while True:
            for run in source.runs(cursor):
                cursor, again = run.end, partial(emitter, number, run)
                yield Done(number, again(), state_of(number, cursor), again)
                if cursor.offset >= until and next(guesses(cursor), None) is not None:
                    break
            else:
                return
            cursor, until = yield from _by_stretches(emitter, pool, number, source.path, cursor, guesses(cursor))


def _by_stretches(
    emitter: Emitter, pool: Pool, number: int, path: Path, cursor: Cursor, guesses: Iterator[Stretch]
) -> Generator[Done, None, tuple[Cursor, int]]:
    """Return from where to go on, and the end of the stretch that was none (0: all were)."""
    wrong = 0
    pieces = takewhile(lambda _: not wrong, guesses)
    for stretch, outcome, newlines in pool.answers(number, pieces, ahead=2):
        assert isinstance(stretch, Stretch), "nothing else was asked for"
        if wrong:  # what is read behind it may be nonsense
            continue
        if outcome is None:
            wrong = stretch.end
            continue
        start = cursor
        cursor = start._replace(number=start.number + outcome.read, line=start.line + newlines, offset=stretch.end)
        again = partial(_once_more, emitter, number, path, stretch, start)
        yield Done(number, _placed(outcome, start), state_of(number, cursor), again)
    return cursor, wrong


def _once_more(emitter: Emitter, number: int, path: Path, stretch: Stretch, start: Cursor, most: int) -> Outcome:
    found = stretch.read(path)
    if found is None:
        raise ParseError(f"{path} changes while it is read, at byte {stretch.start}")
    return _placed(emitter(number, found[0], most), start)


def _placed(outcome: Outcome, start: Cursor) -> Outcome:
    """Return the outcome of what was counted from 1, counted from ``start``."""
    bad = [
        one._replace(
            place=one.place._replace(number=one.place.number + start.number - 1, line=one.place.line + start.line - 1)
        )
        for one in outcome.bad
    ]
    return outcome._replace(bad=bad)
