"""``stats`` and ``head``: figures that can be counted by hand, records that are the bytes of the file."""

import argparse
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_datafmt import FormatError, ParseError, TargetError, read
from mm_datafmt.commands import head as head_command
from mm_datafmt.commands import stats as stats_command
from mm_datafmt.heads import head
from mm_datafmt.statistics import Histogram, stats

WriteFile = Callable[..., Path]


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def run(module: Any, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    module.add(parser.add_subparsers())
    options = parser.parse_args([module.__name__.rpartition(".")[2], *map(str, arguments)])
    code: int = options.run(options)
    return code


RECORDS = [
    {"image": "a.png", "conversations": turns("<image>1234", "12")},
    {"image": ["a.png", "b.jpg"], "conversations": turns("<image><image>", "123456")},
    {"conversations": [{"from": "system", "value": "s"}, *turns("ä", "x"), *turns("b", "y")]},
    {"image": "gone.png", "conversations": turns("<image>", "?")},
    {"conversations": [{"from": "robot", "value": "?"}]},
]


def test_the_figures_of_a_small_file(images: Path, write_array: WriteFile) -> None:
    found = stats(write_array(RECORDS), dataset_dir=images)
    assert (found.format, found.records, found.unreadable) == ("llava", 5, {"unknown_role": 1})
    assert found.roles == {"user": 5, "assistant": 5, "system": 1}
    assert (found.with_system, found.with_tools) == (1, 0)
    assert (found.turns.min, found.turns.max, found.turns.mean, found.turns.count) == (2, 5, 2.8, 4)
    assert found.characters["assistant"].max == 6
    assert found.characters["all"].percentiles["p50"] == 8  # of 13, 20, 5, 8, half do not exceed 8
    assert found.images_per_record.mean == 1.0
    assert found.pictures == {"PNG": 2, "JPEG": 1}
    assert found.missing_pictures == {"missing_file": 1}
    assert (found.width.min, found.width.max, found.height.max) == (5, 8, 6)
    assert found.orientations == {"wide": 2, "square": 1}
    assert found.aspect.max == 133


def test_without_opening_pictures(images: Path, write_lines: WriteFile) -> None:
    found = stats(write_lines(RECORDS), dataset_dir=images / "nowhere", pictures=False)
    assert found.pictures == found.missing_pictures == {}
    assert found.width.count == 0


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(0, 1 << 40) | st.integers(0, 600), min_size=1, max_size=60))
def test_percentiles_are_within_their_error(values: list[int]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    ordered = sorted(values)
    for percent in (1, 5, 25, 50, 75, 95, 99, 100):
        true = ordered[max(0, -(-len(ordered) * percent // 100) - 1)]  # nearest rank
        found = histogram.percentile(percent)
        assert found == true if true < 256 else abs(found - true) <= true / 256
    assert (histogram.smallest, histogram.largest, histogram.total) == (ordered[0], ordered[-1], sum(values))


def test_a_histogram_does_not_grow() -> None:
    histogram = Histogram()
    for value in range(0, 1 << 17, 3):
        histogram.add(value)
    histogram.settle()
    assert len(histogram._buckets) <= 256 + 128 * 9


def test_stats_as_text_and_as_json(images: Path, write_array: WriteFile, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_array(RECORDS)
    assert run(stats_command, source, "--dataset_dir", images) == 0
    out, err = capsys.readouterr()
    assert "5 records, 4 samples" in out
    assert "pictures by format   PNG 2, JPEG 1" in out
    assert "unreadable           unknown_role 1" in out
    assert err == f"{source}: format llava (detected)\n"
    assert run(stats_command, source, "--dataset_dir", images, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["turns"]["percentiles"]["p99"] == 5
    assert found["source"] == str(source)


# Records with odd spacing, escapes and number forms: none of it may change.
ODD = [
    '{"conversations": [{"from" : "human","value":"\\u00e4 ä \\/"},\n  {"from":"gpt", "value": "1"}], "id":1.50}',
    '{ "conversations":[{"from":"human","value":"]},{["},{"from":"gpt","value":"\\""}],"id":1e2}',
    '{"conversations":[{"from":"human","value":"c"},{"from":"gpt","value":"d"}]}',
]


def test_records_of_an_array_keep_their_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text("[" + " ,\n\n".join(ODD) + "]", encoding="utf-8")
    assert head(source, target, 2) == (2, 0)
    assert target.read_text(encoding="utf-8") == f"[\n{ODD[0]},\n{ODD[1]}\n]\n"
    assert list(read(target)) == list(read(source))[:2]
    assert head(source, target, 99, overwrite=True).written == 3


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress])
def test_lines_keep_their_bytes(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    lines = [record.replace("\n", " ") for record in ODD]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(pack("\n\n".join(lines).encode()))
    head(source, target, 2)
    assert target.read_text(encoding="utf-8") == f"{lines[0]}\n{lines[1]}\n"


def test_reading_stops_behind_the_last_record() -> None:
    """The writer of the pipe never ends: only a reader that stops gets here."""
    reading, writing = os.pipe()
    record = json.dumps({"conversations": turns("a", "b" * 1000)}).encode()
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys\nwhile 1: sys.stdout.write(sys.argv[1] + '\\n')", record.decode()],
        stdout=writing,
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        out = io.BytesIO()
        head(f"/dev/fd/{reading}", out, 7)
        assert out.getvalue() == (record + b"\n") * 7
    finally:
        child.kill()
        child.wait()
        os.close(reading)


def test_a_broken_file_gives_what_is_whole(tmp_path: Path) -> None:
    source, out = tmp_path / "in.json", io.BytesIO()
    source.write_text(f'[{ODD[2]}, {{"a": nope}}, {ODD[2]}, {{"conversations": [')
    assert head(source, out, 5) == (2, 2)
    assert json.loads(out.getvalue()) == [json.loads(ODD[2])] * 2
    source.write_text("[{")
    with pytest.raises(ParseError, match="no record that is JSON"):
        head(source, tmp_path / "out.json", 1)
    assert list(tmp_path.iterdir()) == [source]


def numbered(path: Path, count: int, text: int = 10) -> Path:
    path.write_text(
        "".join(json.dumps({"id": n, "conversations": turns("q" * text, "a")}) + "\n" for n in range(count))
    )
    return path


def chosen(source: Path, n: int, seed: int) -> list[int]:
    out = io.BytesIO()
    head(source, out, n, random=True, seed=seed)
    values = [json.loads(line) for line in out.getvalue().splitlines()]
    return [record["id"] for record in (values[0] if isinstance(values[0], list) else values)]


def test_random_records(tmp_path: Path) -> None:
    source = numbered(tmp_path / "in.jsonl", 2000, text=300)  # several blocks of reading
    first = chosen(source, 50, 1)
    assert first == sorted(set(first))
    assert len(first) == 50
    assert first == chosen(source, 50, 1) != chosen(source, 50, 2)
    assert first == chosen(numbered(tmp_path / "short.jsonl", 2000), 50, 1)  # nothing but seed and numbers counts
    assert set(first[:1]) < set(chosen(source, 100, 1))
    assert first[0] < 400
    assert first[-1] > 1600
    assert chosen(source, 5000, 3) == list(range(2000))


def test_every_record_is_as_likely(tmp_path: Path) -> None:
    source = numbered(tmp_path / "in.jsonl", 10)
    hits = [number for seed in range(600) for number in chosen(source, 3, seed)]
    # Binomial with n = 600 and p = 0.3: mean 180, deviation 11.2; five deviations for each of ten records.
    assert all(124 < hits.count(number) < 236 for number in range(10))


def test_the_target_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = numbered(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    target.write_text("mine")
    with pytest.raises(TargetError, match="--overwrite"):
        head(source, target, 3)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        head(source, target, 3, overwrite=True)
    assert target.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_has_no_bytes_of_its_own(tmp_path: Path) -> None:
    coco, array = tmp_path / "coco.json", tmp_path / "a.json"
    coco.write_text('{"images": [], "annotations": []}')
    array.write_text(f"[{ODD[2]}]")
    with pytest.raises(FormatError, match="convert --max_samples 3"):
        head(coco, tmp_path / "out.json", 3)
    with pytest.raises(TargetError, match=r"name the output \.json"):
        head(array, tmp_path / "out.jsonl", 3)
    with pytest.raises(ValueError, match="at least 1"):
        head(array, tmp_path / "out.json", 0)


def test_head_to_stdout_and_to_a_file(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    source = numbered(tmp_path / "in.jsonl", 20)
    lines = source.read_bytes().splitlines(keepends=True)
    assert run(head_command, source, "-n", 3) == 0
    out, err = capsysbinary.readouterr()
    assert out == b"".join(lines[:3])
    assert err == f"{source}: copied 3 of 3 asked for\n".encode()
    assert run(head_command, source, tmp_path / "out.jsonl", "-n", 2, "--random", "--seed", 5) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(lines[n] for n in chosen(source, 2, 5))


@pytest.mark.parametrize("number", ["0", "-3", "x", "1.5", "٣", "9" * 5000])
def test_numbers_that_are_none(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(head_command, "x", f"-n{number}")
    assert caught.value.code == 2
    assert "whole number of at least 1" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    source = numbered(tmp_path / "in.jsonl", 3000, text=500)
    code = (
        "import argparse, sys; from mm_datafmt.commands import head; parser = argparse.ArgumentParser(); "
        "head.add(parser.add_subparsers()); options = parser.parse_args(sys.argv[1:]); sys.exit(options.run(options))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "head", str(source), "-n3000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0
