"""Questions of mm-datafmt's formats: the last answer of each record is the right one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mm_datafmt import DataFormatError, RecordError, Sample, read_each
from mm_finetune.errors import DataError
from mm_finetune.evaluation.answers import Failure
from mm_finetune.evaluation.choices import options_in
from mm_finetune.evaluation.metrics import Metric, right_letters
from mm_finetune.evaluation.questions import PictureFile, Question
from mm_finetune.template import IMAGE, VIDEO


class Records:
    """A file of any format that mm-datafmt reads.

    With ``choice``, the options stand in the question, each on a line of its own (see :func:`.choices.options_in`).

    Args:
        path: the file.
        root: the folder that pictures are relative to.
        metric: how answers are judged; None: ``exact``.
    """

    usual_tokens = 8

    def __init__(self, path: Path, root: Path, metric: Metric | None) -> None:
        self.path, self.root = path, root
        self.metric: Metric = metric or "exact"
        self.why = "asked for" if metric else "records with one right answer"

    def __iter__(self) -> Iterator[Question | Failure]:
        """The questions.

        Raises:
            DataError: the file as a whole can't be read.
        """
        try:
            for number, found in enumerate(read_each(self.path), 1):
                if isinstance(found, RecordError):
                    yield Failure(number=number, reason=f"{found} (line {found.line})")
                    continue
                try:
                    yield question_of(found, number, self.root, choice=self.metric == "choice")
                except DataError as error:
                    yield Failure(number=number, reason=str(error))
        except DataFormatError as error:
            raise DataError(str(error)) from error


def question_of(sample: Sample, number: int, root: Path, *, choice: bool = False) -> Question:
    """The question of a record.

    Args:
        sample: the record.
        number: its number.
        root: the folder that pictures are relative to.
        choice: it is a multiple-choice question.

    Raises:
        DataError: the record does not end with a question and its answer, or a file is missing.
    """
    roles = [message.role for message in sample.messages]
    if roles[-2:] != ["user", "assistant"]:
        raise DataError(f"it does not end with a question and its answer: {roles}")
    missing = [name for name in (*sample.images, *sample.videos) if not (root / name).is_file()]
    if missing:
        raise DataError(f"{root / missing[0]} is missing; is --dataset_dir right?")
    asked, answer = (message.content for message in sample.messages[-2:])
    options: dict[str, str] = {}
    answers: tuple[str, ...] = (answer,)
    if choice:
        options = options_in(asked)
        if not options:
            raise DataError("the question has no options: lines A. …, B. …, and so on")
        answers = right_letters((answer.strip(),), options)
    return Question(
        number=number,
        messages=sample.messages[:-1],
        answers=answers,
        pictures=tuple(PictureFile(root / name) for name in sample.images),
        videos=tuple(root / name for name in sample.videos),
        image=sample.images[0] if sample.images else None,
        shown=asked.replace(IMAGE, "").replace(VIDEO, "").strip(),
        options=options,
    )
