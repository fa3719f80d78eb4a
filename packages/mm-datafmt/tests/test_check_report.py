"""``check`` as a whole: duplicates, policy, the list of bad records, the page, the command."""

import argparse
import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_datafmt import TargetError, check
from mm_datafmt.checking.duplicates import Duplicates, digest_of
from mm_datafmt.commands import check as command
from mm_datafmt.sample import Message, Sample

WriteFile = Callable[..., Path]


def record(text: str = "q", answer: str = "a", image: str | None = None, **fields: object) -> dict[str, object]:
    question = f"<image>\n{text}" if image else text
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image or "", "conversations": turns, **fields}


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    options = parser.parse_args(["check", *map(str, arguments)])
    code: int = options.run(options)
    return code


def codes(path: Path, **arguments: Any) -> list[tuple[int, str]]:
    return [(problem.record, problem.code) for problem in check(path, **arguments).problems]


def test_duplicates_name_the_first(images: Path, write_lines: WriteFile) -> None:
    first = record("x", image="a.png", id="1")
    rows = [first, record("y", image="a.png"), {**first, "id": "2"}, record("x", image="b.jpg"), {**first, "id": "3"}]
    source = write_lines(rows)
    report = check(source, dataset_dir=images)
    assert [(one.record, one.code, one.message) for one in report.problems] == [
        (3, "duplicate_record", "says the same as record 1"),
        (5, "duplicate_record", "says the same as record 1"),
    ]
    assert check(source, dataset_dir=images, ignore=["duplicate_record"]).ok


def test_what_a_duplicate_is() -> None:
    base = Sample((Message("user", "ab"), Message("assistant", "c")), ("x",))
    assert digest_of(base) == digest_of(base._replace(extra={"id": 3}))
    others = [
        base._replace(images=("y",)),
        base._replace(images=(), videos=("x",)),
        base._replace(tools="[]"),
        base._replace(messages=(Message("user", "a"), Message("assistant", "bc"))),
        base._replace(messages=(Message("system", "ab"), Message("assistant", "c"))),
        base._replace(messages=(Message("user", "ab"), Message("assistant", "c", 0.0))),
        base._replace(messages=(Message("user", "\ud800"), Message("assistant", "c"))),
    ]
    assert len({digest_of(one) for one in [base, *others]}) == 8


@given(st.lists(st.integers(1, 40)))
def test_the_table_is_a_dictionary(digests: list[int]) -> None:
    table = Duplicates()
    expected: dict[int, int] = {}
    for number, digest in enumerate(digests, 1):
        assert table.first(digest << 12, number) == expected.get(digest)
        expected.setdefault(digest, number)


def test_the_table_grows() -> None:
    table, chance = Duplicates(), random.Random(3)
    digests = [chance.getrandbits(64) | 1 for _ in range(20_000)]
    assert all(table.first(digest, number) is None for number, digest in enumerate(digests))
    assert [table.first(digest, 0) for digest in digests] == list(range(20_000))


@pytest.mark.parametrize(
    ("arguments", "passed", "rejected", "repaired"),
    [
        ({}, False, 3, 0),
        ({"on_bad": "skip"}, False, 3, 0),
        ({"on_bad": "skip", "max_bad_ratio": 0.29}, False, 3, 0),
        ({"on_bad": "skip", "max_bad_ratio": 0.3}, True, 3, 0),
        ({"on_bad": "repair"}, False, 2, 1),
        ({"on_bad": "repair", "max_bad_ratio": 0.2}, True, 2, 1),
        ({"ignore": ["empty_answer", "duplicate_record", "last_turn"]}, True, 0, 0),
    ],
)
def test_the_policy(
    write_array: WriteFile, arguments: dict[str, Any], passed: bool, rejected: int, repaired: int
) -> None:
    rows = [record(str(number)) for number in range(7)]
    open_end = record("r")
    open_end["conversations"] += [{"from": "human", "value": "and?"}]  # type: ignore[operator]
    report = check(write_array([*rows, record("0"), record("e", answer=" "), open_end]), **arguments)
    assert (report.passed, report.rejected, report.repaired) == (passed, rejected, repaired)
    assert report.lengths.measured == 10 - rejected
    assert report.to_dict()["passed"] is passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"on_bad": "drop"}, "on_bad is 'drop'; legal are error, skip"), ({"max_bad_ratio": 2}, "max_bad_ratio is 2")],
)
def test_a_policy_that_is_none(write_array: WriteFile, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(write_array([record()]), **arguments)


def test_bad_records_are_listed_where_they_stand(write_lines: WriteFile, tmp_path: Path) -> None:
    source, listed = write_lines([record("a"), record("b", answer="")]), tmp_path / "bad.jsonl"
    text = source.read_bytes()
    source.write_bytes(text + b'\n{"broken\n' + text.splitlines(keepends=True)[0])
    check(source, bad_file=listed)
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    places = [(one["record"], one["line"], one["offset"], one["code"], one["action"]) for one in entries]
    whole = len(text)
    assert places == [
        (2, 2, text.index(b"\n") + 1, "empty_answer", "rejected"),
        (3, 4, whole + 1, "syntax", "rejected"),
        (4, 5, whole + 10, "duplicate_record", "rejected"),
    ]
    assert entries[0]["value"] == record("b", answer="")
    assert entries[1]["text"] == '{"broken'
    with pytest.raises(TargetError, match="--overwrite"):
        check(source, bad_file=listed)


def test_a_clean_file_leaves_no_list(write_lines: WriteFile, tmp_path: Path) -> None:
    listed = tmp_path / "bad.jsonl"
    listed.write_text("of an earlier check")
    assert check(write_lines([record()]), bad_file=listed, overwrite=True).ok
    assert not listed.exists()


HOSTILE = "</p><script>alert(1)</script><img src=http://x/ onerror=y>\u202egnp.exe\x1b[31m\"'&"


class Tags(HTMLParser):
    """Collects what a browser would act upon."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(source: Path, target: Path, **arguments: Any) -> Tags:
    check(source, html=target, **arguments)
    parser = Tags()
    parser.feed(target.read_text(encoding="utf-8"))
    return parser


def test_the_page_shows_pictures_and_needs_nothing_else(images: Path, write_array: WriteFile, tmp_path: Path) -> None:
    rows = [record(str(number), "word " * number, image="a.png") for number in range(1, 30)]
    rows += [record("bad", image="no.png"), record("twice", answer="", image="a.png")]
    page = page_of(write_array(rows), tmp_path / "r.html", dataset_dir=images, seq_length=70)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 8 + 8 + 1  # by chance, the longest, and the bad one whose image is there
    assert all(str(one["src"]).startswith("data:image/jpeg;base64,") for one in pictures)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    assert not any(name.startswith("on") or name == "href" for _, one in page.tags for name in one)
    assert "seq_length 70" in page.text
    assert re.search(r"Longest.*Record 29\b.*Record 28\b", page.text, re.DOTALL)
    assert "missing_file" in page.text


def test_hostile_text_is_only_text(images: Path, write_array: WriteFile, tmp_path: Path) -> None:
    (images / "<b>&'.png").write_bytes((images / "a.png").read_bytes())
    rows = [
        record(HOSTILE, HOSTILE, image="<b>&'.png"),
        record("\ud800", image=HOSTILE.replace("/", "|")),
        {"image": HOSTILE, "conversations": [{"from": HOSTILE, "value": HOSTILE}]},
    ]
    page = page_of(write_array(rows), tmp_path / "r.html", dataset_dir=images, source_format="llava")
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(str(one.get("src", "data:")).startswith("http") for _, one in page.tags)
    assert "alert(1)" in page.text
    assert "\u202e" not in page.text
    assert "\x1b" not in page.text
    assert "\\u202e" in page.text


def test_the_page_is_the_same_each_time(images: Path, write_array: WriteFile, tmp_path: Path) -> None:
    source = write_array([record(str(number), image="a.png") for number in range(100)])
    for name in ("1", "2"):
        check(source, dataset_dir=images, html=tmp_path / name)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with pytest.raises(TargetError):
        check(source, dataset_dir=images, html=tmp_path / "1")


def test_an_image_too_large_for_a_thumbnail(images: Path, write_array: WriteFile, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("1", (8000, 8000)).save(images / "large.png")
    page = page_of(write_array([record(image="large.png")]), tmp_path / "r.html", dataset_dir=images)
    assert "img" not in {tag for tag, _ in page.tags}
    assert "8000x8000: too large for a thumbnail" in page.text


def test_the_command(images: Path, write_array: WriteFile, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_array([record(str(number), image="a.png") for number in range(3)])
    assert run(source, "--dataset_dir", images, "--seq_length", 30) == 0
    out, err = capsys.readouterr()
    assert f"{source}: format llava (detected)" in err
    assert "3 records, no problems\n" in out
    assert "seq_length 30 would truncate 0 of 3 samples (0.00 %)" in out
    assert re.search(r"^ *\d+-\d+  3  [█#]+$", out, re.MULTILINE)


def test_the_command_with_problems(images: Path, write_array: WriteFile, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_array([record("x", image="a.png"), record("y", answer="")])
    listed = source.with_suffix(".bad.jsonl")
    assert run(source, "--dataset_dir", images, "--json") == 1
    out = json.loads(capsys.readouterr().out)
    assert (out["passed"], out["rejected"], out["counts"]) == (False, 1, {"empty_answer": 1})
    assert out["lengths"]["measured"] == sum(count for _, _, count in out["lengths"]["histogram"]) == 1
    assert not listed.exists()
    assert run(source, "--dataset_dir", images, "--on_bad", "skip", "--max_bad_ratio", "0.5") == 0
    assert "by reason: empty_answer 1" in capsys.readouterr().out
    assert json.loads(listed.read_text())["record"] == 2
    assert run(source, "--dataset_dir", images, "--ignore", "empty_answer", "--min_side", 7) == 1
    assert "is 8x6; --min_side is 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--max_bad_ratio", "2"], ["--max_aspect", "0.5"], ["--seq_length", "0"], ["--workers", "x"]]
)
def test_numbers_that_are_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("x.json", *arguments)
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err
