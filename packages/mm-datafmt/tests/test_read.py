"""Records out of files: arrays and lines, whole and broken, and in constant memory."""

import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_datafmt import FORMATS, FormatError, Message, ParseError, RecordError, Sample, read, read_each
from mm_datafmt.splitting import Place, Run

WriteFile = Callable[..., Path]


def record(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}


def texts(path: Path) -> list[str]:
    return [sample.messages[0].content for sample in read(path)]


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf", b" \n\n", b"\xef\xbb\xbf\t\r\n"])
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays(tmp_path: Path, prefix: bytes, indent: int | None) -> None:
    path = tmp_path / "f"
    path.write_bytes(prefix + json.dumps([record("x"), record("图")], indent=indent).encode() + b"\n")
    assert texts(path) == ["x", "图"]


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf", b" \n\n"])
def test_json_lines_with_blank_lines_and_no_final_newline(tmp_path: Path, prefix: bytes) -> None:
    path = tmp_path / "f"
    lines = [json.dumps(record(text), ensure_ascii=False).encode() for text in ("x", "图\u2028y", "z")]
    path.write_bytes(prefix + lines[0] + b"\r\n \n\n" + lines[1] + b"\n" + lines[2])
    assert texts(path) == ["x", "图\u2028y", "z"]


def test_many_records_over_many_pieces(tmp_path: Path) -> None:
    path = tmp_path / "f"
    expected = [f"é{number}" * (number % 700) for number in range(1500)]
    path.write_text(json.dumps([record(text) for text in expected], ensure_ascii=False), encoding="utf-8")
    assert texts(path) == expected


def test_values_of_every_kind_around_a_record(tmp_path: Path) -> None:
    deep = [[], {}, [1, {"a": {"messages": 1}}]]
    extra: dict[str, object] = {"n": None, "t": True, "i": -12, "f": 1.5e3, "list": deep, "messages ": {}}
    path = tmp_path / "f"
    path.write_text(json.dumps([{**extra, **record("x")}]), encoding="utf-8")
    assert texts(path) == ["x"]


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    for name, body in (("array", json.dumps([record("x"), record("y")])), ("lines", json.dumps(record("x")))):
        pipe = tmp_path / name
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(body,))
        writer.start()
        assert texts(pipe)[0] == "x"
        writer.join()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (3000, 30000):
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps([record("x" * 2000)] * count), encoding="utf-8")
        list(zip(read(path), range(1), strict=False))  # imports are not what is measured
        tracemalloc.start()
        assert sum(1 for _ in read(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 8_000_000 < 30000 * 2000
    assert peaks[1] < 1.2 * peaks[0]


GOOD = json.dumps(record("x")).encode()


@pytest.mark.parametrize(
    ("body", "whole", "offset"),
    [
        (b"[" + GOOD + b"," + GOOD[:20], 1, 1 + len(GOOD) + 1 + 20),
        (b"[" + GOOD, 1, 1 + len(GOOD)),
        (b"[" + GOOD + b",", 1, 2 + len(GOOD)),
        (b" [", 0, 2),
    ],
)
def test_a_truncated_array(tmp_path: Path, body: bytes, whole: int, offset: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(body)
    samples = read(path)
    for _ in range(whole):
        next(samples)
    with pytest.raises(
        ParseError, match=rf"ends at byte {offset}, in record {whole + 1}, .*after {whole} whole"
    ) as caught:
        next(samples)
    assert (caught.value.record, caught.value.offset) == (whole + 1, offset)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"a": @}', "Expecting value"), (b'{"a": @NaN}', "NaN is not JSON"), (b'{"a": "@\xff"}', "not UTF-8"),
        (b'{"a": "@\xff', "not UTF-8"), (b'{"a": 1@]', "Expecting ',' delimiter"), (b'{"a": "@\0"}', "a NUL byte"),
        (b"@" + b"[" * 65, "nested deeper than 64 levels"), (b"@" + b"[" * 1500 + b"]" * 1500, "deeper than 64"),
    ],
)  # fmt: skip
def test_an_invalid_array_says_record_and_byte(tmp_path: Path, bad: bytes, reason: str) -> None:
    """The ``@`` marks the byte before which everything is legal; it is taken out."""
    clean = bad.replace(b"@", b"")
    filler = b"[" + b",".join([GOOD] * 2000)  # several pieces, so that the place is found beyond the first
    path = tmp_path / "f"
    path.write_bytes(filler + b"," + clean + b" " * 5000 + b"]")
    with pytest.raises(ParseError, match=reason) as caught:
        list(read(path))
    assert caught.value.record == 2001
    assert caught.value.offset == len(filler) + 1 + bad.index(b"@")
    assert f"record 2001 (line 1) is not valid JSON at byte {caught.value.offset}" in str(caught.value)


@pytest.mark.parametrize("tail", [b"x", b"[]", b"]", b"{}"])
def test_garbage_after_the_array(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"[" + GOOD + b"]\n" + tail)
    with pytest.raises(ParseError, match=rf"\(line 2\) is not valid JSON at byte {len(GOOD) + 3}: something follows"):
        list(read(path))


def test_an_invalid_array_from_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"[" + GOOD + b", nope]",))
    writer.start()
    with pytest.raises(ParseError, match=r"record 2 \(line 1\) is not valid JSON") as caught:
        list(read(pipe))
    writer.join()
    assert caught.value.offset == 1 + len(GOOD) + 2


@pytest.mark.parametrize("number", [b"1" * 6000, b"1e999999999999", b"-1" + b"0" * 400 + b".5"])
def test_numbers_beyond_reason_are_refused(tmp_path: Path, number: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(b'[{"id": ' + number + b"}]")
    with pytest.raises(ParseError, match=r"record 1 \(line 1\) is not valid JSON at byte \d+: .*infinity"):
        list(read(path, format="llava"))


@pytest.mark.parametrize(
    ("bad", "where", "reason"),
    [
        (b'{"a":', 5, "Expecting value"), (b'{"a": "\xc3\xa9" x}', 10 + 1, "Expecting ',' delimiter"),
        (b'{"a": "\xff"}', 7, "not UTF-8"), (b'{"a": NaN}', 6, "NaN is not JSON"),
        (b'{"a":' * 100000, 0, "nested deeper"), (b'{"a": ' + b"1" * 6000 + b"}", 0, "infinity"),
        (b"{", 1, "one whole record on each line"),
    ],
)  # fmt: skip
def test_an_invalid_line_says_record_line_and_byte(tmp_path: Path, bad: bytes, where: int, reason: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(GOOD + b"\n\n" + bad + b"\n")
    with pytest.raises(ParseError, match=reason) as caught:
        list(read(path))
    assert (caught.value.record, caught.value.offset) == (2, len(GOOD) + 2 + where)
    assert "record 2 (line 3) is not valid JSON" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the file is empty"), (b" \n", "the file is empty"), (b"[]", "holds no record"),
        (b'"text"', "begins with b'\"' at byte 0"), (b" \n7", "begins with b'7' at byte 2"),
        ("[]".encode("utf-16"), "in UTF-8"), (b"\x89PNG", "expected a JSON array"),
    ],
)  # fmt: skip
def test_files_that_are_no_data_set(tmp_path: Path, body: bytes, message: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(body)
    with pytest.raises(ParseError, match=message):
        list(read(path))


def test_a_record_that_does_not_fit_says_where(write_array: WriteFile, write_lines: WriteFile) -> None:
    records = [record("x"), {"messages": []}]
    with pytest.raises(RecordError, match=r"source\.json: record 2 \(line 1\): 'messages' must be a list") as caught:
        list(read(write_array(records)))
    assert (caught.value.record, caught.value.line, caught.value.code) == (2, 1, "record")
    with pytest.raises(RecordError, match=r"record 2 \(line 2\): ") as caught:
        list(read(write_lines(records)))
    assert caught.value.line == 2


def test_the_format_can_be_named_and_is_checked_at_once(write_array: WriteFile) -> None:
    path = write_array([{"conversations": [{"from": "human", "value": "x"}], "messages": []}])
    assert [sample.messages[0].content for sample in read(path, format="llava")] == ["x"]
    with pytest.raises(FormatError, match="known formats"):
        read(path, format="xml")


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        list(read(tmp_path))
    with pytest.raises(FileNotFoundError):
        list(read(tmp_path / "no"))


def test_each_record_has_its_place_whatever_is_wrong_with_others(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\n".join([GOOD, b'{"a":', json.dumps({"messages": []}).encode(), b"", GOOD]))
    first, undecoded, unfit, last = read_each(path)
    assert isinstance(first, Sample)
    assert first == last
    assert isinstance(undecoded, RecordError)
    assert (undecoded.code, undecoded.record, undecoded.line, undecoded.offset) == ("syntax", 2, 2, len(GOOD) + 1 + 5)
    assert str(undecoded) == "not valid JSON: Expecting value"
    assert isinstance(unfit, RecordError)
    assert (unfit.code, unfit.record, unfit.line, unfit.offset) == ("record", 3, 3, len(GOOD) + 1 + 6)
    assert str(unfit).startswith("'messages' must be a list")


def test_each_record_of_an_array_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"[" + GOOD + b"," + GOOD[:20])
    whole, rest = read_each(path)
    assert isinstance(whole, Sample)
    assert isinstance(rest, RecordError)
    assert (rest.code, rest.record) == ("truncated", 2)
    assert "cut short after 1 whole records" in str(rest)


def test_each_record_of_a_layout_of_ones_own(write_array: WriteFile) -> None:
    def parse(value: object) -> Sample:
        if not isinstance(value, str):
            raise RecordError("no text")
        return Sample((Message("user", value),))

    found = list(read_each(write_array(["x", 7]), parse=parse))
    assert found[0] == Sample((Message("user", "x"),))
    assert isinstance(found[1], RecordError)
    assert (str(found[1]), found[1].record) == ("no text", 2)


def test_what_is_no_data_set_is_told_of_each_record_too(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"nothing")
    with pytest.raises(ParseError, match="expected a JSON array"):
        list(read_each(tmp_path / "f"))


def test_places_are_looked_for_once_a_run_however_many_records_are_bad(
    write_array: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking is a scan of the run: for each bad record, it would take the square of the file's length."""
    looked, places = [], Run.places

    def counted(run: Run) -> list[Place]:
        looked.append(run.start.number)
        return places(run)

    monkeypatch.setattr(Run, "places", counted)
    found = list(read_each(write_array([{"messages": []}] * 500 + [record("x")]), parse=FORMATS["messages"].parse))
    assert [fault.record for fault in found[:-1] if isinstance(fault, RecordError)] == list(range(1, 501))
    assert len(looked) == len(set(looked))
