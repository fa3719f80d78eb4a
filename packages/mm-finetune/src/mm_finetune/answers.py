"""What a model answered: the JSON file that ``eval`` writes and ``report`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm_finetune.errors import DataError
from mm_finetune.output import write_file

KEYS = ("image", "question", "answer", "prediction", "correct")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question.

    Attributes:
        image: path of the (first) picture relative to the dataset folder; None without a picture.
        question: the last user turn, without ``<image>``.
        answer: the right answer.
        prediction: what the model said.
        correct: whether they are equal, white space at the ends aside.
    """

    image: str | None
    question: str
    answer: str
    prediction: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Group:
    """All records with the same question. `accuracy` is the share of right answers, 0 to 1."""

    count: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All answers of a model to a data set.

    Attributes:
        model: the model folder, as it was given.
        dataset_dir: the folder that pictures are relative to.
        answers: in the order of the data; at least one.
    """

    model: str
    dataset_dir: Path
    answers: Sequence[Answer]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return _accuracy(self.answers)

    @property
    def groups(self) -> dict[str, Group]:
        """Accuracy by question, in the order of the data."""
        found: dict[str, list[Answer]] = {}
        for answer in self.answers:
            found.setdefault(answer.question, []).append(answer)
        return {name: Group(count=len(group), accuracy=_accuracy(group)) for name, group in found.items()}

    def describe(self) -> str:
        """A few lines for a terminal: accuracy in all, then by question, the largest groups first."""
        groups = sorted(self.groups.items(), key=lambda item: -item[1].count)[:20]
        rows = [("all", len(self.answers), self.accuracy)] + [(name, g.count, g.accuracy) for name, g in groups]
        width = min(60, max(len(name) for name, _, _ in rows))
        # A question is data: what would steer the terminal is shown, not sent.
        return "\n".join(
            f"{_printable(name)[:width]:{width}}  {accuracy:7.1%}  of {count:,}" for name, count, accuracy in rows
        )

    def save(self, path: Path, *, overwrite: bool) -> None:
        """Write the file; the dataset folder is stored relative to it, so that both can move together.

        Raises:
            OutputExistsError: it exists and is not to be replaced.
        """
        value = {
            "model": self.model,
            "dataset_dir": Path(os.path.relpath(self.dataset_dir, path.parent)).as_posix(),
            "accuracy": self.accuracy,
            "groups": {name: asdict(group) for name, group in self.groups.items()},
            "samples": [asdict(answer) for answer in self.answers],
        }
        write_file(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n", overwrite=overwrite)

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read the file.

        Raises:
            DataError: it is not what ``mm-finetune eval`` writes.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            answers = [_answer(item) for item in value["samples"]]
            if not answers:
                raise ValueError("no samples")
            folder = path.parent / str(value["dataset_dir"])
            return cls(model=str(value["model"]), dataset_dir=folder, answers=answers)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{path} is not a file that mm-finetune eval wrote: {error!r}") from error


def _accuracy(answers: Sequence[Answer]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)


def _answer(item: Any) -> Answer:
    values = {key: item[key] for key in KEYS}
    image = values["image"]
    texts = [values[key] for key in ("question", "answer", "prediction")] + ([] if image is None else [image])
    if not all(isinstance(text, str) for text in texts) or not isinstance(values["correct"], bool):
        raise TypeError(f"a sample with the wrong types: {item!r:.200}")
    return Answer(**values)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
