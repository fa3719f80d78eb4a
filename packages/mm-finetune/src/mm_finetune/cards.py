"""Cards of a page: a picture, the question, the right answer, and what the model said at several times."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mm_finetune.evaluation.answers import Answer
from mm_finetune.images import read_rgb

if TYPE_CHECKING:
    from mm_finetune.report import Case

MAX_STAGES = 5  # answers on a card
MAX_LETTERS = 120  # of a text; what is longer can be unfolded
THUMBNAIL_PIXELS = 224


def cards(title: str, words: str, cases: Sequence[Case], labels: Sequence[str], root: Path | None) -> str:
    """A section; nothing without cases.

    Args:
        title: of the section.
        words: below it.
        cases: one a card.
        labels: of the answers of a case.
        root: the folder that pictures are relative to.

    Raises:
        DataError: a picture is damaged; one that is missing is said to be.
    """
    if not cases or root is None:
        return ""
    shown = "".join(_card(case, labels, root) for case in cases)
    return f'<h2>{title}</h2><p class="soft">{words}</p><ul class="cards">{shown}</ul>'


def _card(case: Case, labels: Sequence[str], root: Path) -> str:
    last = case.last
    kind, verdict = ("", "✓ right") if last.correct else (" wrong", "✗ wrong")
    graded = f" ({last.value:.2f})" if last.correct and last.value < 1 else ""
    said = "".join(f"<dt>{labels[n]}</dt><dd>{_said(case.answers[n])}</dd>" for n in _few(len(labels)))
    return (
        f'<li class="card{kind}"><p class="verdict">{verdict}{graded}</p>{_picture(root, last.image)}'
        f'<div class="question">{_folded(last.question)}</div><dl class="said">'
        f"<dt>answer</dt><dd>{_folded(last.answer)}</dd>{said}</dl></li>"
    )


def _few(count: int) -> list[int]:
    """The first, the last, and some between, evenly."""
    if count <= MAX_STAGES:
        return list(range(count))
    return [round(place * (count - 1) / (MAX_STAGES - 1)) for place in range(MAX_STAGES)]


def _said(answer: Answer) -> str:
    kind, mark = ("right", "✓") if answer.correct else ("wrong", "✗")
    text = _folded(answer.prediction) or '<span class="soft">(nothing)</span>'
    return f'<span class="{kind}" role="img" aria-label="{kind}:">{mark}</span>&nbsp;{text}'


def _folded(text: str) -> str:
    if len(text) <= MAX_LETTERS:
        return escape(text)
    return (
        f"<details><summary>{escape(text[: MAX_LETTERS - 20])}…</summary>{escape(text[MAX_LETTERS - 20 :])}</details>"
    )


def _picture(root: Path, image: str | None) -> str:
    if image is None:
        return ""
    path = root / image
    return f'<img alt="" src="{_data_uri(path)}">' if path.exists() else '<div class="none">picture missing</div>'


def _data_uri(path: Path) -> str:
    picture = read_rgb(path)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    # A photograph is a fifth as large as JPEG; what is small is kept as it is.
    kind, options = ("JPEG", {"quality": 88}) if picture.width * picture.height > 20_000 else ("PNG", {})
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
