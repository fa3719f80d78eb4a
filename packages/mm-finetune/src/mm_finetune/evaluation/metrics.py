"""How an answer is judged: a score from 0 to 1 against all answers that are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from mm_finetune.errors import DataError
from mm_finetune.evaluation.choices import chosen

Metric = Literal["exact", "anls", "relaxed", "choice"]
METRICS: tuple[Metric, ...] = get_args(Metric)
TITLES: Mapping[str, str] = {
    "exact": "Exactly right answers",
    "anls": "ANLS",
    "relaxed": "Right answers, numbers within 5 %",
    "choice": "Right choices",
}

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
# What VLMEvalKit puts beside the right answer of MMMU's open questions, to judge them by the rules for choices.
OTHER_ANSWERS = "Other Answers"


def score(metric: Metric, prediction: str, answers: Sequence[str], options: Mapping[str, str] | None = None) -> float:
    """Judge an answer.

    Args:
        metric: ``exact``, ``anls``, ``relaxed`` or ``choice``; see the functions of this module.
        prediction: what the model said.
        answers: all right answers, at least one; the best counts.
        options: texts by letter, for ``choice``.

    Returns:
        0 to 1.
    """
    if metric == "choice":
        return choice(prediction, answers, options or {})
    return max(_BY_TEXT[metric](prediction, answer) for answer in answers)


def exact(prediction: str, answer: str) -> float:
    """1 if both are the same, upper and lower case and white space aside.

    That is what VLMEvalKit counts for OCRVQA and GQA (``vlmeval/dataset/utils/vqa_eval.py``, "accuracy").
    """
    return float(_plain(prediction) == _plain(answer))


def anls(prediction: str, answer: str) -> float:
    """Normalised Levenshtein similarity, 0 where it is below a half.

    ``1 - distance / length of the longer``, case and white space aside (Biten et al., "Scene Text Visual Question
    Answering", ICCV 2019, arXiv 1905.13648, section 3.3; DocVQA takes it over, arXiv 2007.00398). The mean over
    questions is ANLS. At exactly one half the paper says 0; the challenge's script and VLMEvalKit count it, and so does
    this.
    """
    ours, theirs = _plain(prediction), _plain(answer)
    longer = max(len(ours), len(theirs))
    if not longer:
        return 1.0
    if abs(len(ours) - len(theirs)) > longer * (1 - ANLS_THRESHOLD):
        return 0.0
    similarity = 1 - levenshtein(ours, theirs) / longer
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def relaxed(prediction: str, answer: str) -> float:
    """ChartQA's relaxed accuracy: a number may be off by 5 % of the right one, anything else is compared exactly.

    Masry et al., arXiv 2203.10244, section 5.1, as pix2struct and VLMEvalKit compute it: ``12%`` is 0.12, a right
    answer of 0 is compared as text, upper and lower case are the same.
    """
    ours, theirs = _number(prediction), _number(answer)
    if ours is not None and theirs:
        return float(abs(ours - theirs) <= RELAXED_TOLERANCE * abs(theirs))
    return exact(prediction, answer)


def choice(prediction: str, answers: Sequence[str], options: Mapping[str, str]) -> float:
    """1 if the answer means the right option, see :mod:`.choices`.

    A question without options (MMMU has some) is judged by the rule for texts: a right answer is found in the
    prediction, and the prediction is not much longer than it.
    """
    if options:
        letter = chosen(prediction, options)
        return float(letter is not None and letter in answers)
    return max(float(chosen(prediction, {"": answer, " ": OTHER_ANSWERS}) == "") for answer in answers)


def right_letters(answers: Sequence[str], options: Mapping[str, str]) -> tuple[str, ...]:
    """The letters of right answers, which may be given as letters or as an option's text.

    Raises:
        DataError: one is neither.
    """
    letters = {_plain(text): letter for letter, text in options.items()}
    found = tuple(answer if answer in options else letters.get(_plain(answer), "") for answer in answers)
    if not all(found):
        raise DataError(f"the right answer {answers[0]!r} is none of the options {', '.join(options)}, nor its text")
    return found


def is_right(metric: Metric, value: float) -> bool:
    """Whether a score is that of a right answer; of ANLS, of one that counts at all."""
    return value >= ANLS_THRESHOLD if metric == "anls" else value == 1


def levenshtein(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of a character that make `one` the `other`."""
    row = list(range(len(other) + 1))
    for count, ours in enumerate(one, 1):
        before, row[0] = row[0], count
        for place, theirs in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (ours != theirs))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


_BY_TEXT: dict[str, Callable[[str, str], float]] = {"exact": exact, "anls": anls, "relaxed": relaxed}
