"""Metrics: the papers' own definitions and examples, and laws that they obey."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_finetune.errors import DataError
from mm_finetune.evaluation.choices import chosen, options_in
from mm_finetune.evaluation.metrics import anls, exact, is_right, levenshtein, relaxed, right_letters, score

TEXT = st.text("ab c", max_size=8)


def plain_distance(one: str, other: str) -> int:
    """The definition, without a table."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return plain_distance(one[1:], other[1:])
    return 1 + min(
        plain_distance(one[1:], other), plain_distance(one, other[1:]), plain_distance(one[1:], other[1:])
    )  # fmt: skip


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_the_distance_is_levenshteins(one: str, other: str) -> None:
    assert levenshtein(one, other) == plain_distance(one, other)


def test_exact_match_knows_no_case_and_no_white_space() -> None:
    assert exact(" The  Moon\n", "the moon") == 1
    assert exact("moon.", "moon") == 0
    assert score("exact", "b", ["a", "B"]) == 1, "one of several right answers is enough"


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Coca-Cola", "coca-cola", 1.0),
        ("kitten", "sitting", 1 - 3 / 7),  # the usual example of the distance, 3
        ("abcd", "abxy", 0.5),  # exactly a half still counts
        ("abcde", "abxyz", 0.0),  # 2/5 is below it
        ("", "a", 0.0),
        ("", "", 1.0),
        ("a very long answer that goes on", "a", 0.0),
    ],
)
def test_anls(prediction: str, answer: str, expected: float) -> None:
    assert anls(prediction, answer) == pytest.approx(expected)


@given(TEXT, TEXT)
def test_anls_is_the_formula(prediction: str, answer: str) -> None:
    one, other = (" ".join(text.split()) for text in (prediction, answer))
    longer = max(len(one), len(other))
    similarity = 1 - plain_distance(one, other) / longer if longer else 1
    assert anls(prediction, answer) == pytest.approx(similarity if similarity >= 0.5 else 0)
    assert anls(prediction, answer) == anls(answer, prediction)


def test_an_answer_that_anls_counts_is_right() -> None:
    assert [is_right("anls", value) for value in (0.0, 0.5, 0.9)] == [False, True, True]
    assert [is_right("exact", value) for value in (0.0, 1.0)] == [False, True]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("94.9", "100", 0),
        ("-3", "3", 0), ("-2.9", "-3", 1),
        ("12%", "0.12", 1), ("12%", "12%", 1), ("12", "12%", 0),
        ("0", "0", 1), ("0.0001", "0", 0),  # nothing is within 5 % of 0
        ("Yes", "yes", 1), ("yes.", "yes", 0), ("ten", "10", 0), ("nan", "100", 0), ("nan", "nan", 1), ("inf", "5", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction: str, answer: str, expected: int) -> None:
    assert relaxed(prediction, answer) == expected


OPTIONS = {"A": "a red ball", "B": "a green cube", "C": "none of these", "D": "42"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("b", None), ("The answer is B", "B"), ("B. a green cube", "B"),
        ("**C**: none of these", "C"), ("A is right", "A"), ("The answer is A", "A"),
        ("A cat sits there", None),  # an article
        ("A green cube", "B"), ("It is a GREEN cube", "B"), ("42", "D"),
        ("B or C", None), ("a red ball and a green cube", None), ("", None), ("E", None),
        ("a green cube " + "and more " * 20, None),  # more than twice as long as all options
        ("BC", None),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_means(answer: str, letter: str | None) -> None:
    assert chosen(answer, OPTIONS) == letter
    assert score("choice", answer, [letter or "A"], OPTIONS) == (letter is not None)


def test_an_open_question_among_choices_is_judged_by_its_text() -> None:
    assert score("choice", "It is 3/4.", ["0.75", "3/4"]) == 1
    assert score("choice", "It is 1/2.", ["0.75", "3/4"]) == 0
    assert score("choice", "It is 3/4, because of much that has to be said about it.", ["3/4"]) == 0


def test_options_that_stand_in_a_question() -> None:
    assert options_in("Which?\nA. red\n (B) green \nC) blue") == {"A": "red", "B": "green", "C": "blue"}
    assert options_in("Which?\nA. red\nC. blue") == {}, "a gap"
    assert options_in("A. Lincoln was born when?") == {}
    assert right_letters(["B", " GREEN"], {"A": "red", "B": "green"}) == ("B", "B")
    with pytest.raises(DataError, match="'blue' is none of the options A, B"):
        right_letters(["blue"], {"A": "red", "B": "green"})
