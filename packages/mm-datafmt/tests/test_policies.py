"""What becomes of bad records, and when an interrupted conversion may go on."""

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mm_datafmt import BadSamplesError, ParseError, ResumeError, conversion, convert, outcomes, read, splitting

WriteFile = Callable[..., Path]


def record(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


GOOD = record("q", "a")


def bad_lines(target: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in target.with_suffix(".bad.jsonl").read_text(encoding="utf-8").splitlines()]


def test_skip_lists_what_it_leaves_out(tmp_path: Path, write_lines: WriteFile) -> None:
    source, target = write_lines([GOOD, record("q", ""), GOOD, record("<image>", "a"), 7]), tmp_path / "out.json"
    with source.open("ab") as file:
        file.write(b'{"conversations": NaN}\n{"cut')
    report = convert(source, target, on_bad="skip")
    assert (report.records, report.written, report.rejected) == (7, 2, 5)
    assert [(e["record"], e["line"], e["code"], e["action"]) for e in bad_lines(target)] == [
        (2, 2, "empty_answer", "rejected"), (4, 4, "image_count", "rejected"), (5, 5, "record", "rejected"),
        (6, 6, "nan", "rejected"), (7, 7, "truncated", "rejected"),
    ]  # fmt: skip
    data = source.read_bytes()
    for entry, value in zip(bad_lines(target), [record("q", ""), record("<image>", "a"), 7], strict=False):
        assert entry["value"] == value
        assert data[entry["offset"] :].startswith(json.dumps(value).encode())
    assert bad_lines(target)[3]["text"] == '{"conversations": NaN}'
    assert len(list(read(target))) == 2


def test_a_cut_array_keeps_what_was_whole(tmp_path: Path) -> None:
    source = tmp_path / "cut.json"
    source.write_text(json.dumps([GOOD] * 3)[:-10])
    with pytest.raises(ParseError, match=r"in record 3, .*cut short"):
        convert(source, tmp_path / "out.json")
    report = convert(source, tmp_path / "out.json", on_bad="skip")
    assert (report.records, report.written, report.counts) == (3, 2, {"truncated": 1})


@pytest.mark.parametrize(
    ("bad", "turns"),
    [
        ({"conversations": [*GOOD["conversations"], {"from": "human", "value": "?"}]}, ["q", "a"]),
        ({"conversations": [{"from": "gpt", "value": "Hi"}, *GOOD["conversations"]]}, ["q", "a"]),
        ({"conversations": [*GOOD["conversations"], *record("q", " ")["conversations"]]}, ["q", "a"]),
        (record("q\0", "a"), ["q", "a"]),
        (record("What?", "a", image="x.png"), ["<image>\nWhat?", "a"]),
    ],
)  # fmt: skip
def test_what_is_repaired(tmp_path: Path, write_array: WriteFile, bad: dict[str, Any], turns: list[str]) -> None:
    target = tmp_path / "out.json"
    report = convert(write_array([bad]), target, on_bad="repair", media="none")
    assert [message.content for message in next(read(target)).messages] == turns
    assert (report.written, report.repaired, report.rejected) == (1, 1, 0)
    assert bad_lines(target)[0]["action"] == "repaired"


@pytest.mark.parametrize("bad", [record("q", ""), record("<image>", "a"), record("<image>q<image>", "a", image="x")])
def test_what_cannot_be_repaired(tmp_path: Path, write_array: WriteFile, bad: dict[str, Any]) -> None:
    report = convert(write_array([GOOD, bad]), tmp_path / "out.json", on_bad="repair", media="none")
    assert (report.records, report.written, report.rejected) == (2, 1, 1)


def test_too_many_bad_ones(tmp_path: Path, write_array: WriteFile) -> None:
    source = write_array([GOOD, record("q", ""), GOOD, GOOD])
    with pytest.raises(BadSamplesError, match=r"1 of 4 records were rejected, more than max_bad_ratio 0\.2"):
        convert(source, tmp_path / "out.json", on_bad="skip", max_bad_ratio=0.2)
    assert list(tmp_path.iterdir()) == [source]
    convert(source, tmp_path / "out.json", on_bad="skip", max_bad_ratio=0.25)
    with pytest.raises(BadSamplesError, match="no record is left"):
        convert(write_array([record("q", "")]), tmp_path / "none.json", on_bad="skip")


def test_fields_without_a_place_are_reported(tmp_path: Path, write_array: WriteFile) -> None:
    report = convert(write_array([{**GOOD, "id": "1", "source": "x"}, {**GOOD, "id": "2"}]), tmp_path / "out.json")
    assert report.lost == {"id": 2, "source": 1}
    assert "field 'id' of 2 records has no place in messages" in report.describe()
    convert(write_array([{**GOOD, "id": "1"}]), tmp_path / "back.json", target_format="sharegpt")
    assert json.loads((tmp_path / "back.json").read_text())[0]["id"] == "1"


def test_data_json_fits_the_paths(images: Path, write_array: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    root = images.parent
    monkeypatch.chdir(root.parent)
    convert(
        write_array([record("<image>", "a", image="a.png")]),
        root / "train.json",
        image_dir=images,
        data_json=root / "data.json",
    )
    basic = json.loads((root / "data.json").read_text())["dataset_param"]["basic_parameters"]
    (entry,) = json.loads(Path(basic["dataset"]).read_text())
    assert (Path(basic["dataset_dir"]) / entry["images"][0]).is_file()  # joined as the trainer joins them
    assert (basic["dataset"], basic["dataset_dir"]) == ("./data/train.json", "./data")


def test_several_processes_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "RUN", 1 << 12)
    entries: list[Any] = [record(f"{n} é", "" if n % 17 == 0 else "a" * (1 + n % 97), id=n) for n in range(1500)]
    text = json.dumps([*entries[:700], 7, *entries[700:]]).replace('"id": 900', '"id": NaN')
    (tmp_path / "s.json").write_text(text.replace('"id": 901}', '"id": 901, "id": 1}'), encoding="utf-8")
    reports = []
    for workers in (1, 3):
        target = tmp_path / f"{workers}.json"
        reports.append(convert(tmp_path / "s.json", target, workers=workers, on_bad="skip", val_ratio=0.2))
    assert reports[0] == reports[1]
    # Every 17th answer is empty; number 901, one of them, has a key twice.
    assert reports[0].counts == {"duplicate_key": 1, "empty_answer": 88, "nan": 1, "record": 1}
    for suffix in (".json", ".val.json", ".bad.jsonl"):
        assert (tmp_path / "1.json").with_suffix(suffix).read_bytes() == (tmp_path / "3.json").with_suffix(
            suffix
        ).read_bytes()


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert until the first checkpoint, then be interrupted."""
    monkeypatch.setattr(conversion, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patch:

        def stopping(*arguments: Any) -> Iterator[Any]:
            yield from islice(outcomes.in_order(*arguments), 3)
            raise KeyboardInterrupt

        patch.setattr(conversion, "in_order", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, max_samples=3000)


def test_resume_refuses_what_has_changed(
    tmp_path: Path, write_array: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_array([record("q" * 300, "a")] * 4000), tmp_path / "out.json"
    convert(source, tmp_path / "anew.json", resume=True)  # nothing to go on from: from the beginning
    interrupted(source, target, monkeypatch)
    with pytest.raises(ResumeError, match="options changed"):
        convert(source, target, resume=True, seed=1, max_samples=3000)
    convert(source, target, resume=True, max_samples=3000)
    assert len(list(read(target))) == 3000
    target.unlink()
    interrupted(source, target, monkeypatch)
    os.utime(source, (1, 1))
    with pytest.raises(ResumeError, match="sources changed"):
        convert(source, target, resume=True, max_samples=3000)
    convert(source, target)  # without: from the beginning
    assert len(list(read(target))) == 4000
    assert not list(tmp_path.glob(".*"))
