"""Any cut of the bytes into blocks gives the records that ``json.loads`` gives, and their places."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_datafmt import splitting
from mm_datafmt.errors import RecordError
from mm_datafmt.scanning import ValueScanner
from mm_datafmt.splitting import Cursor, Run, array_runs, line_runs
from mm_datafmt.window import Window

text = st.text(st.sampled_from('aé图"\\{}[],: \n\t'), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
records = st.lists(st.fixed_dictionaries({"id": values}, optional={"x": values}) | values, max_size=12)
layouts = st.sampled_from(
    [
        {}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False},
        {"indent": 0, "separators": (" ,", " :")},
    ]
)  # fmt: skip
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def in_pieces(data: bytes, lengths: list[int]) -> Callable[[int], bytes]:
    """A ``read`` that returns pieces of these lengths, again and again."""
    stream, turn = io.BytesIO(data), iter(lengths * (len(data) // sum(lengths) + 1))
    return lambda size: stream.read(min(size, next(turn, 1)))


def array(data: bytes, read: Callable[[int], bytes] | None = None, **options: Any) -> list[Run]:
    window = Window(read or io.BytesIO(data).read)
    window.available(1)
    window.position = 1
    return list(array_runs(window, Cursor(), **options))


def decoded(runs: list[Run]) -> list[Any]:
    return [value for run in runs for value in run.values]


def codes(runs: list[Run]) -> list[str | None]:
    return [value.code if isinstance(value, RecordError) else None for value in decoded(runs)]


@pytest.fixture(params=[50, splitting.RUN], ids=["short runs", "runs"])
def run_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Short runs, so that small examples have many, and those that are used."""
    size: int = request.param
    monkeypatch.setattr(splitting, "RUN", size)
    return size


@given(records, layouts, sizes)
def test_arrays_in_any_blocks(expected: list[Any], layout: dict[str, Any], lengths: list[int]) -> None:
    data = json.dumps(expected, **layout).encode()
    for size in (50, 1 << 18):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splitting, "RUN", size)
            assert decoded(array(data, in_pieces(data, lengths))) == expected


@given(records, layouts, sizes)
def test_places_are_where_the_records_stand(expected: list[Any], layout: dict[str, Any], lengths: list[int]) -> None:
    data = json.dumps(expected, **layout).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "RUN", 50)
        places = [place for run in array(data, in_pieces(data, lengths)) for place in run.places()]
    assert [place.number for place in places] == list(range(1, len(expected) + 1))
    for place, value in zip(places, expected, strict=True):
        assert json.loads(place.text) == value
        assert data[place.offset :].startswith(place.text)
        assert place.line == 1 + data[: place.offset].count(b"\n")


@given(st.lists(values, max_size=12), st.lists(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \n"])), sizes)
def test_lines_in_any_blocks(expected: list[Any], breaks: list[bytes], lengths: list[int]) -> None:
    ends = [*breaks, *[b"\n"] * len(expected)]
    data = b"".join(json.dumps(v).encode() + end for v, end in zip(expected, ends, strict=False))
    for size in (20, 1 << 18):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splitting, "RUN", size)
            runs = list(line_runs(Window(in_pieces(data, lengths)), Cursor()))
        assert decoded(runs) == expected
        for place in (place for run in runs for place in run.places()):
            assert json.loads(place.text) == expected[place.number - 1]
            assert data[place.offset :].startswith(place.text)
            assert place.line == 1 + data[: place.offset].count(b"\n")


@given(records, layouts, st.integers(0, 11))
def test_going_on_behind_any_run(expected: list[Any], layout: dict[str, Any], stop: int) -> None:
    data = json.dumps(expected, **layout).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "RUN", 30)
        runs = array(data)
        if not runs or runs[min(stop, len(runs) - 1)] is runs[-1]:
            return
        first = runs[: stop + 1]
        cursor = first[-1].end
        window = Window(io.BytesIO(data[cursor.offset :]).read, cursor.offset)
        assert decoded(first) + decoded(list(array_runs(window, cursor))) == expected


@given(st.binary(max_size=60), sizes)
def test_any_bytes_end_without_an_exception(data: bytes, lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "RUN", 16)
        whole, pieces = array(b"[" + data), array(b"[" + data, in_pieces(b"[" + data, lengths))
        assert [str(value) for value in decoded(whole)] == [str(value) for value in decoded(pieces)]
        lines = list(line_runs(Window(in_pieces(data, lengths)), Cursor()))
        assert len(decoded(lines)) == sum(bool(line.strip(b" \t\r\n\v\f")) for line in data.split(b"\n"))


GOOD, SAME = b'{"id": 1, "t": "x"}', {"id": 1, "t": "x"}


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (b'{"id": NaN}', "nan"), (b'{"id": -Infinity}', "nan"), (b'{"id": 1, "id": 2}', "duplicate_key"),
        (b'{"id": {"a": 1, "a" : 1}}', "duplicate_key"), (b'{"id": [{"b": "x\\": y", "b":1}]}', "duplicate_key"),
        (b'{"id": "\xff"}', "utf8"), (b'{"id": "\0"}', "nul_byte"), (b'{"id": 1]', "syntax"), (b'{"id" 1}', "syntax"),
        (b'{"id": "never closed}', "syntax"), (b'{"id": {"open": 1}', "syntax"), (b'{"id": "\\ud800"}', "surrogate"),
        (b'{"id": ' + b"[" * 2000 + b"]" * 2000 + b"}", "too_deep"), (b'{"id": ' + b'{"a":' * 2000 + b"}", "too_deep"),
        (b'{"id": "' + b"x" * 400_000 + b'"}', "too_large"), (b"", "syntax"), (b'{"id": 01}', "syntax"),
    ],
)  # fmt: skip
def test_a_bad_record_has_a_reason_and_its_neighbours_are_read(bad: bytes, code: str, run_size: int) -> None:
    data = b"[" + b", ".join([GOOD] * 40 + [bad] + [GOOD] * 40) + b"]"
    runs = array(data, max_record=300_000 if code == "too_large" else 1 << 20)
    assert codes(runs) == [None] * 40 + [code] + [None] * 40
    assert [value for value in decoded(runs) if isinstance(value, dict)] == [SAME] * 80
    place = next(place for run in runs for place in run.places() if place.number == 41)
    assert place.offset == 1 + 40 * (len(GOOD) + 2)


def test_a_missing_comma_and_one_too_many(run_size: int) -> None:
    data = b"[" + GOOD + b", " + GOOD + b" " + GOOD + b", " + GOOD + b",]"
    assert codes(array(data)) == [None, None, "syntax", None, "syntax"]


def test_a_truncated_array_keeps_what_was_whole(run_size: int) -> None:
    data = b"[" + b", ".join([GOOD] * 30)
    for cut in range(len(data) - len(GOOD), len(data)):
        runs = array(data[:cut])
        assert codes(runs) == [None] * 29 + ["truncated"]
        assert f"ends at byte {cut}, in record 30" in str(decoded(runs)[-1])
    assert codes(array(data)) == [None] * 30 + ["truncated"]  # no bracket closes it


def test_a_huge_record_passes_in_constant_memory() -> None:
    """200 MB that are never held: the stream is made as it is read."""
    pieces = iter([b'[{"id": 1, "t": "', *[b'x\\"' * (1 << 16)] * 1024, b'"}, ', GOOD, b"]"])
    held = []

    class Watched(Window):
        def available(self, size: int) -> bool:
            held.append(len(self.buffer))
            return super().available(size)

    window = Watched(lambda size: next(pieces, b""))
    window.available(1)
    window.position = 1
    runs = list(array_runs(window, Cursor(), max_record=1 << 20))
    assert codes(runs) == ["too_large", None]
    assert max(held) < 4 << 20


def test_a_huge_line_passes_in_constant_memory() -> None:
    pieces = iter([b'{"t": "', *[b"x" * (1 << 18)] * 200, b'"}\n', GOOD + b"\n"])
    runs = list(line_runs(Window(lambda size: next(pieces, b"")), Cursor(), max_record=1 << 20))
    assert codes(runs) == ["too_large", None]
    assert runs[-1].places()[0].line == 2


def test_a_cut_line_at_the_end(run_size: int) -> None:
    runs = list(line_runs(Window(io.BytesIO(GOOD + b"\n" + GOOD[:9]).read), Cursor()))
    assert codes(runs) == [None, "truncated"]


@given(values, st.integers(1, 7))
def test_the_scanner_finds_the_end_in_pieces(value: Any, step: int) -> None:
    data = json.dumps([value])[1:].encode()
    scanner, buffer = ValueScanner(0), b""
    for start in range(0, len(data), step):
        buffer += data[start : start + step]
        end = scanner.end_in(buffer)
        if end >= 0:
            break
    assert json.loads(data[:end]) == value
    assert end == len(data) - 1
