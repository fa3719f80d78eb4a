"""Several inputs: weights, the order of a shuffle, the choice of validation records; every kind of file."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mm_datafmt import FormatError, ParseError, Source, convert, read, splitting
from mm_datafmt.outputs import is_validation

WriteFile = Callable[..., Path]


def records(name: str, count: int) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": ""}]
    return [{"conversations": [turns[0], {**turns[1], "value": f"{name}{n}"}]} for n in range(count)]


def answers(path: Path) -> list[str]:
    return [sample.messages[-1].content for sample in read(path)]


def test_sources_follow_each_other(tmp_path: Path, write_array: WriteFile, write_lines: WriteFile) -> None:
    sources = [write_array(records("a", 3)), write_lines(records("b", 2))]
    report = convert(sources, tmp_path / "out.jsonl")
    assert answers(tmp_path / "out.jsonl") == ["a0", "a1", "a2", "b0", "b1"]
    assert (report.records, report.written, report.rejected) == (5, 5, 0)


def test_weights_are_shares_until_one_source_is_used_up(tmp_path: Path, write_array: WriteFile) -> None:
    a, b = write_array(records("a", 70), "a.json"), write_array(records("b", 1000), "b.json")
    convert([Source(a, 0.7), Source(b, 0.3)], tmp_path / "out.json")
    taken = answers(tmp_path / "out.json")
    assert Counter(answer[0] for answer in taken) == {"a": 70, "b": 30}
    assert [answer for answer in taken if answer[0] == "a"] == [f"a{n}" for n in range(70)]
    for end in range(10, 101, 10):  # every stretch holds the proportion
        assert sum(answer[0] == "a" for answer in taken[:end]) == pytest.approx(0.7 * end, abs=1)


def test_a_shuffle_depends_on_seed_and_place_alone(
    tmp_path: Path, write_array: WriteFile, write_lines: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = records("a", 200), records("b", 100)
    first = [write_array(a, "1.json"), write_lines(b, "2.jsonl")]
    packed = tmp_path / "3.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(a, indent=1).encode()))
    orders = {}
    for name, sources, seed, run in (
        ("a", first, 0, 1 << 18), ("b", [packed, first[1]], 0, 1 << 18), ("c", first, 0, 100), ("d", first, 1, 100),
    ):  # fmt: skip
        monkeypatch.setattr(splitting, "RUN", run)
        convert(sources, tmp_path / f"{name}.json", shuffle=True, seed=seed)
        orders[name] = answers(tmp_path / f"{name}.json")
    assert orders["a"] == orders["b"] == orders["c"] != orders["d"]
    everything = [f"a{n}" for n in range(200)] + [f"b{n}" for n in range(100)]
    assert sorted(orders["a"]) == sorted(orders["d"]) == sorted(everything)
    assert orders["a"] != everything
    assert not list(tmp_path.glob(".*"))  # the unpacked copy is gone


def test_source_names() -> None:
    assert Source.named("a.json=0.7") == Source(Path("a.json"), 0.7)
    assert Source.named("a.json") == Source(Path("a.json"))
    assert Source.named("run=3/a.json") == Source(Path("run=3/a.json"))
    with pytest.raises(FormatError, match="must be a positive number"):
        Source.named("a.json=-1")
    with pytest.raises(FormatError, match="give all of them one, or none"):
        convert([Source(Path(), 1.0), Source(Path())], "x.json")


@given(st.integers(1, 2000), st.floats(0.01, 0.9), st.integers(0, 3))
def test_the_share_of_validation_records(count: int, ratio: float, seed: int) -> None:
    chosen = sum(is_validation(number, ratio, seed) for number in range(count))
    assert abs(chosen - count * ratio) <= 1.5


def test_a_validation_file(tmp_path: Path, write_array: WriteFile) -> None:
    source = write_array(records("a", 100))
    for name in ("1", "2"):
        report = convert(source, tmp_path / f"{name}.json", val_ratio=0.1, seed=3)
    train, validation = answers(tmp_path / "1.json"), answers(tmp_path / "1.val.json")
    assert (len(train), len(validation), report.validation) == (90, 10, 10)
    assert sorted(train + validation) == sorted(f"a{n}" for n in range(100))
    assert (tmp_path / "1.val.json").read_bytes() == (tmp_path / "2.val.json").read_bytes()


def test_the_first_n(tmp_path: Path, write_array: WriteFile) -> None:
    bad: list[dict[str, Any]] = [{"conversations": []}]
    source = write_array(bad + records("a", 5) + bad + records("b", 5))
    report = convert(source, tmp_path / "out.json", max_samples=6, on_bad="skip")
    assert answers(tmp_path / "out.json") == ["a0", "a1", "a2", "a3", "a4", "b0"]
    assert (report.records, report.written, report.rejected) == (8, 6, 2)


def pack(kind: str, path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "gzip":
        path.write_bytes(gzip.compress(lines))
    elif kind == "zstd":
        path.write_bytes(zstandard.compress(lines[:100]) + zstandard.compress(lines[100:]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["gzip", "zstd", "parquet"])
def test_packed_files_and_tables(tmp_path: Path, kind: str) -> None:
    pack(kind, tmp_path / "f", records("a", 700))
    assert answers(tmp_path / "f") == [f"a{n}" for n in range(700)]
    convert(tmp_path / "f", tmp_path / "out.json", shuffle=True)
    assert len(answers(tmp_path / "out.json")) == 700


@pytest.mark.parametrize("kind", ["gzip", "zstd", "parquet"])
def test_broken_packing(tmp_path: Path, kind: str) -> None:
    pack(kind, tmp_path / "f", records("a", 700))
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ParseError, match=r"unpacked|not a parquet file|cut short|ends at byte"):
        list(read(tmp_path / "f"))


def coco(section: str, annotations: list[dict[str, Any]]) -> str:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 640, "height": 480} for n in (7, 8, 9)]
    content = {"info": {"a": [1]}, section: annotations, "images": images, "categories": [
        {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]}  # fmt: skip
    return json.dumps(content)


def test_coco_captions(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(coco("annotations", [{"image_id": 8, "id": n, "caption": f" A dog {n}. "} for n in range(5)]))
    samples = list(read(path))
    assert [sample.messages[1].content for sample in samples] == [f"A dog {n}." for n in range(5)]
    assert {sample.images for sample in samples} == {("8.jpg",)}
    assert all(sample.messages[0].content.startswith("<image>\n") for sample in samples)
    assert len({sample.messages[0].content for sample in samples}) > 1


def test_coco_objects(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    box = {"bbox": [10.4, 20.0, 5.0, 6.2], "iscrowd": 0}
    path.write_text(
        coco(
            "annotations",
            [
                {"image_id": 9, "category_id": 18, "id": 1, **box}, {"image_id": 7, "category_id": 1, "id": 2, **box},
                {"image_id": 9, "category_id": 1, "id": 3, **box}, {"image_id": 9, "category_id": 18, "id": 4, **box},
                {"image_id": 8, "category_id": 1, "id": 5, "bbox": [0, 0, 1, 1], "iscrowd": 1},
            ],
        )
    )  # fmt: skip
    assert [s.messages[1].content for s in read(path, format="coco_classes")] == ["person", "dog, person"]
    assert [s.messages[1].content for s in read(path, format="coco_counts")] == ["person: 1", "dog: 2, person: 1"]
    boxes = [json.loads(sample.messages[1].content) for sample in read(path)]
    assert boxes[0] == [{"bbox_2d": [10, 20, 15, 26], "label": "person"}]
    assert [entry["label"] for entry in boxes[1]] == ["dog", "person", "dog"]
    with pytest.raises(FormatError, match="is a COCO annotation file, not llava"):
        list(read(path, format="llava"))
    convert(path, tmp_path / "out.json", media="none", shuffle=True)
    assert {s.images for s in read(tmp_path / "out.json")} == {("7.jpg",), ("9.jpg",)}
