"""Rows that are dealt out as they are read, and the order in which workers take jobs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mm_convert import CheckpointError, Conversion, Plan, Ref, Segment, Spec, copying
from mm_convert.dealing import MOST_PARTS, readings
from mm_convert.execution import Target
from mm_convert.job_queue import JobQueue
from mm_convert.safetensors_file import SafetensorsLayout, read_safetensors

WHOLE = Ref("x", "", "w")


def made(directory: Path, tensor: torch.Tensor, spans: Sequence[tuple[str, int, int]]) -> dict[str, torch.Tensor]:
    """Targets cut out of one matrix's columns: (target, first, last)."""
    save_file({"w": tensor}, directory / "x")
    names = dict.fromkeys(name for name, _, _ in spans)
    segments, widths = [], dict.fromkeys(names, 0)
    for name, start, stop in spans:
        segments.append(Segment(WHOLE, start, Ref("made", "", name), widths[name], stop - start, 1))
        widths[name] += stop - start
    plan = Plan.build(
        {WHOLE: Spec("I16", tuple(tensor.shape))},
        {Ref("made", "", name): Spec("I16", (len(tensor), widths[name])) for name in names},
        segments,
    )
    layouts = {"made": SafetensorsLayout.of(plan.targets)}
    target = Target(directory=directory / "out", layouts=layouts, others={}, options={})
    read = {"x": read_safetensors(directory / "x")}
    Conversion(plan=plan, source="x", files=read, target=target).run(workers=1, overwrite=True)
    return load_file(directory / "out" / "made")


@given(st.integers(1, 40), st.integers(1, 9), st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), max_size=4))
@settings(max_examples=40, deadline=None)
def test_columns_in_any_number_of_targets(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, more: list[tuple[int, int]]
) -> None:
    """One whole copy, and further targets of parts that overlap, leave gaps or come again."""
    tensor = torch.arange(rows * columns, dtype=torch.int16).reshape(rows, columns)
    half = columns // 2
    spans = [("a", half, columns), ("a", 0, half)] if half else [("a", 0, columns)]
    spans += [(f"b{n}", at, min(at + size, columns)) for n, (at, size) in enumerate(more) if at < columns]
    found = made(tmp_path_factory.mktemp("columns"), tensor, spans)
    for name in {name for name, _, _ in spans}:
        assert torch.equal(found[name], torch.cat([tensor[:, a:b] for n, a, b in spans if n == name], 1))


def test_a_source_is_read_once_and_again_for_what_is_in_several(tmp_path: Path) -> None:
    plan = Plan.build(
        {WHOLE: Spec("I16", (5, 8))},
        {Ref("made", "", name): Spec("I16", (5, 4)) for name in "abc"},
        [Segment(WHOLE, start, Ref("made", "", name), 0, 4, 1) for name, start in (("a", 0), ("b", 4), ("c", 2))],
    )
    one, two = readings(plan, list(plan.targets), 5)
    assert [(s.start, s.stop, s.target and s.target.name) for s in one.spans] == [(0, 8, "a"), (8, 16, "b")]
    assert [(s.start, s.stop, s.target and s.target.name) for s in two.spans] == [
        (0, 4, None),
        (4, 12, "c"),
        (12, 16, None),
    ]
    assert (one.gap, two.gap) == (0, 4)


def test_more_parts_than_one_reading_takes(tmp_path: Path) -> None:
    columns = 2 * MOST_PARTS + 10
    tensor = torch.randint(0, 30000, (3, columns), dtype=torch.int16)
    spans = [("ab"[at % 2], at, at + 1) for at in range(columns)]
    found = made(tmp_path, tensor, spans)
    assert torch.equal(found["a"], tensor[:, ::2])
    assert torch.equal(found["b"], tensor[:, 1::2])


def test_readings_that_end_early_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give less than was asked for, up to the middle of a part."""
    (tmp_path / "x").write_bytes(bytes(range(100)))
    real: Callable[..., int] = os.preadv
    asked: list[int] = []

    def short(descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
        asked.append(offset)
        return real(descriptor, [parts[0][:7], *([] if len(parts[0]) > 7 else [p[:2] for p in parts[1:2]])], offset)

    monkeypatch.setattr(os, "preadv", short)
    room = [memoryview(bytearray(n)) for n in (5, 20, 0, 1, 30, 4)]
    descriptor = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        copying.read_scattered(descriptor, room, 10)
        assert b"".join(room) == bytes(range(10, 70))
        assert len(asked) > len(room)
        with pytest.raises(CheckpointError, match="ends at byte 100"):
            copying.read_scattered(descriptor, room, 60)
    finally:
        os.close(descriptor)


def job(*files: str) -> copying.Job:
    return tuple(Ref(file, "", str(number)) for number, file in enumerate(files))


def test_workers_take_jobs_of_files_that_nobody_writes() -> None:
    first, second = ([job("a")] * 3, [job("b")] * 3)
    queue = JobQueue([*first, *second, job("a", "b"), job("c")])
    one, two, three = iter(queue), iter(queue), iter(queue)
    assert [next(one), next(two), next(three)] == [job("a"), job("b"), job("c")]
    assert next(three) == job("a"), "all are busy: the first in order"
    assert next(two) == job("b")
    assert [*one] == [job("a"), job("b"), job("a", "b")], "alone at last, in order"
    assert [*two, *three] == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_is_done_once(workers: int) -> None:
    jobs = [tuple(Ref(f"f{number % 3}", "", f"{number} {part}") for part in range(2)) for number in range(50)]
    queue, done = JobQueue(jobs), list[Any]()
    threads = [threading.Thread(target=lambda: done.extend(queue)) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(jobs)
