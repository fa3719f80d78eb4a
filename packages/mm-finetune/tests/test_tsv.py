"""VLMEvalKit's tables as they are: made here by the documented columns, with pictures in every documented form."""

from __future__ import annotations

import base64
import csv
import io
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_finetune.errors import DataError
from mm_finetune.evaluation import open_questions
from mm_finetune.evaluation.answers import Failure
from mm_finetune.evaluation.questions import Question


def encoded(colour: tuple[int, int, int], side: int = 30) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side + 1), colour).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


RED, BLUE = encoded((255, 0, 0)), encoded((0, 0, 255))


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As pandas' ``to_csv(sep="\\t", index=False)`` writes it."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def questions(path: Path, **options: Any) -> list[Any]:
    return list(open_questions(path, **options))


def test_choices_as_in_ai2d(tmp_path: Path) -> None:
    path = table(tmp_path / "AI2D_TEST.tsv", [
        {"index": 3, "image": RED, "question": "Which\tcolour\nis it?", "A": "red", "B": "green", "C": "",
         "answer": "A", "category": "food web", "split": "test"},
        {"index": 5, "image": 3, "question": "And this?", "A": "1", "B": "2", "answer": "B", "hint": "Look."},
        {"index": 4, "image": 7, "question": "Later row", "A": "1", "B": "2", "answer": "B"},
        {"index": 7, "image": BLUE, "question": "Blue?", "A": "yes", "B": "no", "answer": "yes"},
        {"index": 8, "image": 99, "question": "?", "A": "yes", "B": "no", "answer": "A"},
    ])  # fmt: skip
    found = open_questions(path)
    assert (found.metric, found.why) == ("choice", "the table has options")
    first, second, third, fourth, fifth = found
    assert isinstance(first, Question)
    assert first.messages[-1].content == (
        "<image>Question: Which\tcolour\nis it?\nOptions:\nA. red\nB. green\n"
        "Please select the correct answer from the options above."
    )
    assert (first.options, first.answers, first.groups) == ({"A": "red", "B": "green"}, ("A",), ("test", "food web"))
    assert first.pictures[0].read().getpixel((0, 0)) == (255, 0, 0)
    assert isinstance(second, Question)
    assert second.messages[-1].content.startswith("<image>Hint: Look.\nQuestion: And this?\nOptions:\nA. 1\n")
    assert second.pictures[0].size() == (30, 31)
    assert second.pictures[0].read().getpixel((0, 0)) == (255, 0, 0), "the picture of another row"
    assert isinstance(third, Question)
    assert third.pictures[0].read().getpixel((0, 0)) == (0, 0, 255), "of a row that comes later"
    assert fourth == Failure(number=4, reason="the answer 'yes' is none of the options A, B")
    assert fifth == Failure(number=5, reason="its picture is that of row '99', which is not there")


def test_several_pictures_and_open_questions_as_in_mmmu(tmp_path: Path) -> None:
    path = table(tmp_path / "MMMU_DEV_VAL.tsv", [
        {"index": 1, "image": str([RED, BLUE]), "question": "Compare <image 2> with <image 1>", "A": "<image 1>",
         "B": "x", "answer": "B", "category": "Art", "l2-category": "Humanities", "split": "validation"},
        {"index": 2, "image": RED, "question": "How much?", "answer": "['0.75', '3/4']", "split": "dev"},
        {"index": 3, "image": RED, "question": "See <image 3>", "A": "p", "B": "q", "answer": "A"},
    ])  # fmt: skip
    found = open_questions(path)
    first, second, third = found
    assert found.metric == "choice"
    assert isinstance(first, Question)
    assert first.messages[-1].content.startswith("Question: Compare <image> with <image>\nOptions:\nA. <image>\nB. x\n")
    colours = [picture.read().getpixel((0, 0)) for picture in first.pictures]
    assert colours == [(0, 0, 255), (255, 0, 0), (255, 0, 0)]
    assert first.groups == ("validation", "Art", "Humanities")
    assert isinstance(second, Question)
    assert second.messages[-1].content == "<image>Question: How much?"
    assert second.answers == ("0.75", "3/4")
    assert third == Failure(number=3, reason="the text names picture 3, the row has 1")


@pytest.mark.parametrize(
    ("name", "row", "metric"),
    [
        ("DocVQA_VAL.tsv", {"answer": "['a', 'b']"}, "anls"),
        ("mine.tsv", {"answer": "['a', 'b']"}, "anls"),
        ("ChartQA_TEST.tsv", {"answer": "14"}, "relaxed"),
        ("mine.tsv", {"answer": "14", "split": "test_human"}, "relaxed"),
        ("mine.tsv", {"answer": "14"}, "exact"),
    ],
)
def test_the_metric_follows_the_table(tmp_path: Path, name: str, row: dict[str, str], metric: str) -> None:
    path = table(tmp_path / name, [{"index": 0, "image": RED, "question": "What?"} | row])
    found = open_questions(path)
    assert found.metric == metric
    (question,) = found
    assert isinstance(question, Question)
    assert question.messages[-1].content == "<image>What?\nAnswer the question using a single word or phrase."
    assert open_questions(path, metric="exact").metric == "exact"


def test_pictures_in_files_and_rows_that_cannot_be_asked(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    path = table(tmp_path / "mine.tsv", [
        {"index": 1, "image_path": "a.png", "question": "What?", "answer": "x"},
        {"index": 2, "image_path": "['a.png', 'a.png']", "question": "What?", "answer": "x"},
        {"index": 3, "image_path": "none.png", "question": "What?", "answer": "x"},
        {"index": 4, "image_path": "", "question": "What?", "answer": "x"},
        {"index": 5, "image_path": "a.png", "question": "What?", "answer": ""},
    ])  # fmt: skip
    one, two, *bad = questions(path)
    assert (one.image, one.pictures[0].size(), len(two.pictures)) == ("a.png", (40, 20), 2)
    reasons = [failure.reason for failure in bad]
    assert "is --dataset_dir right" in reasons[0]
    assert reasons[1:] == [
        "it has no picture",
        "it has no answer: a test set whose answers are kept back can't be judged",
    ]


def test_a_picture_that_is_none_is_told_when_it_is_read(tmp_path: Path) -> None:
    path = table(tmp_path / "mine.tsv", [
        {"index": 1, "image": "A" * 100, "question": "What?", "answer": "x"},
        {"index": 2, "image": "A" * 101 + "=", "question": "What?", "answer": "x"},
    ])  # fmt: skip
    for question in questions(path):
        with pytest.raises(DataError, match=r"base64|can't be read"):
            question.pictures[0].size()


def test_large_pictures_are_never_held_together(tmp_path: Path) -> None:
    """24 rows of 1 MB each; the csv module alone would refuse cells above 128 KiB."""
    large = RED + "=" * 1_000_000
    limit = csv.field_size_limit()
    path = table(tmp_path / "mine.tsv", [
        {"index": n, "image": large, "question": f"{n}?", "answer": "x"} for n in range(24)
    ])  # fmt: skip
    tracemalloc.start()
    assert sum(question.pictures[0].size()[0] for question in questions(path)) == 24 * 30
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12_000_000
    assert csv.field_size_limit() == limit, "the process's own limit is as it was"


def test_what_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("index\tquestion\tanswer\n")
    with pytest.raises(DataError, match="holds no question"):
        open_questions(tmp_path / "a.tsv")
