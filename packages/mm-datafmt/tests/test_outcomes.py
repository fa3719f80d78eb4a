"""Several processes, each of which reads its part of a file, find what one finds: records, faults, places, order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fuzz_records import WRITTEN, records_text

from mm_datafmt import FORMATS, convert, splitting, stretches
from mm_datafmt.emitting import Emitter, Outcome
from mm_datafmt.errors import DataFormatError
from mm_datafmt.inputs import Input, open_input
from mm_datafmt.judging import Judge
from mm_datafmt.media import MediaFolder
from mm_datafmt.outcomes import in_order
from mm_datafmt.splitting import Cursor
from mm_datafmt.workers import Pool

GOOD = {"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small files have many."""
    monkeypatch.setattr(stretches, "STRETCH", 700)
    monkeypatch.setattr(splitting, "RUN", 400)


def emitter_for(folder: Path, name: str, inputs: int = 1) -> Emitter:
    judges = [Judge(FORMATS[name], MediaFolder(folder, folder, check="none")) for _ in range(inputs)]
    return Emitter(judges, FORMATS["messages"], b",\n")


def told(outcomes: list[Outcome]) -> object:
    """What all outcomes together say, however they were cut."""
    data = b",\n".join(outcome.data for outcome in outcomes if outcome.data)
    bad = [(one.place, [(f.code, str(f)) for f in one.faults], one.mended) for o in outcomes for one in o.bad]
    return data, bad, sum(o.read for o in outcomes), sum(o.written for o in outcomes)


def found(emitter: Emitter, inputs: list[Input], workers: int, state: Any = None) -> list[Any]:
    return list(in_order(emitter, inputs, state, None, workers))


def spoiled_files(folder: Path, count: int) -> Iterator[tuple[str, Path]]:
    rng = random.Random(5)
    for number in range(count):
        name = rng.choice(WRITTEN)
        path = folder / f"{number}.json"
        path.write_bytes(records_text(name, rng))
        yield name, path


def test_spoiled_files(tmp_path: Path) -> None:
    stretched = 0
    for name, path in spoiled_files(tmp_path, 25):
        try:
            source = open_input(path)
        except DataFormatError:
            continue
        emitter = emitter_for(tmp_path, name)
        one, three = found(emitter, [source], 1), found(emitter, [source], 3)
        assert told([done.outcome for done in three]) == told([done.outcome for done in one]), path
        stretched += sum(done.outcome.read > 1 for done in three)
    assert stretched > 10, "stretches were read"


def test_going_on_behind_any_stretch_and_ending_within(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    values = [{**GOOD, "id": n, "x": "y" * (n % 50)} for n in range(200)]
    path.write_text(json.dumps([*values[:90], 5, *values[90:]], indent=1))
    emitter, source = emitter_for(tmp_path, "llava"), open_input(path)
    dones = found(emitter, [source], 2)
    whole = told([done.outcome for done in dones])
    assert max(done.outcome.read for done in dones) > 1
    for number, done in [*enumerate(dones)][::7]:
        rest = found(emitter, [source], 2, json.loads(json.dumps(done.state)))
        assert told([one.outcome for one in [*dones[: number + 1], *rest]]) == whole
        again = done.again(1)
        assert (again.written, again.data) == (1, done.outcome.data.split(b",\n")[0])


def test_what_looks_like_a_beginning_within_a_text(tmp_path: Path) -> None:
    """The cut is guessed wrong, and that is noticed."""
    false = json.dumps([GOOD] * 9)[1:-1]
    values = [{**GOOD, "id": n, "x": false if n % 7 == 0 else ""} for n in range(60)]
    for indent in (None, 0):
        path = tmp_path / f"{indent}.json"
        # Not escaped as JSON would have it: quotes are what makes it look like records.
        path.write_text(json.dumps(values, indent=indent).replace('\\"', '"', 0))
        emitter, source = emitter_for(tmp_path, "llava"), open_input(path)
        one, two = found(emitter, [source], 1), found(emitter, [source], 2)
        assert told([done.outcome for done in two]) == told([done.outcome for done in one])
    nested = tmp_path / "nested.json"  # records within records begin as these do
    nested.write_text(json.dumps([{"id": n, **GOOD, "x": [GOOD] * 9} for n in range(60)]))
    emitter, source = emitter_for(tmp_path, "llava"), open_input(nested)
    one, two = found(emitter, [source], 1), found(emitter, [source], 2)
    assert told([done.outcome for done in two]) == told([done.outcome for done in one])
    assert sum(done.outcome.written for done in two) == 60


def test_stretches_end_where_a_record_begins(tmp_path: Path) -> None:
    lines = [json.dumps({**GOOD, "id": n}) for n in range(100)]
    for layout, text, opening in (
        ("lines", "\n".join(lines) + "\n", b""),
        ("array", "[" + " ,\r\n ".join(lines) + "]", b'} ,\r\n {"id":'),
    ):
        path = tmp_path / layout
        path.write_bytes(text.encode())
        begin = text.index("{")
        with path.open("rb") as file:
            cut = list(stretches.stretches(file.fileno(), layout, Cursor(offset=begin, opening=opening)))
        reads = [stretch.read(path) for stretch in cut]
        assert len(cut) > 3
        numbers: list[Any] = []
        for stretch, read in zip(cut, reads, strict=True):
            assert stretch.start == begin
            assert text[stretch.end :].startswith("{")
            assert read is not None
            numbers += [value["id"] for value in read[0].values]  # type: ignore[index]
            begin = stretch.end
        assert numbers == list(range(len(numbers)))


def test_an_answer_larger_than_the_memory_that_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_datafmt.workers._SLOT", 100)
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{**GOOD, "id": n} for n in range(300)]))
    reports = [convert(path, tmp_path / f"{workers}.json", workers=workers) for workers in (1, 2)]
    assert reports[0] == reports[1]
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_a_fault_of_a_worker_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{**GOOD, "id": n} for n in range(300)]))
    emitter = emitter_for(tmp_path, "llava")
    with Pool(emitter, [tmp_path / "gone.json"], 2) as pool:
        guesses = iter([stretches.Stretch(0, 10, 1, "array")])
        with pytest.raises(FileNotFoundError):
            list(pool.answers(0, guesses, ahead=2))


def test_a_file_that_cannot_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "id": n}) + "\n" for n in range(100)))
    emitter, source = emitter_for(tmp_path, "llava"), open_input(path)
    assert source.can_be_cut
    packed = replace(source, seekable=False, stream=path.open("rb"), head=b"")
    assert told([one.outcome for one in found(emitter, [packed], 2)]) == told(
        [one.outcome for one in found(emitter, [source], 2)]
    )
