"""What a model answered: the JSON file that ``eval`` and runs write and ``report`` reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_finetune.errors import DataError
from mm_finetune.output import write_file

KEYS = ("image", "question", "answer", "prediction", "correct")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question.

    Attributes:
        image: path of the (first) picture relative to the dataset folder; None without a picture file.
        question: the last user turn, without ``<image>``.
        answer: the right answer, the first of several.
        prediction: what the model said.
        correct: whether that is right; of a graded metric, right enough to count at all.
        score: 0 to 1; None: 1 where it is correct, else 0.
        groups: what it is counted under; none: under its question.
    """

    image: str | None
    question: str
    answer: str
    prediction: str
    correct: bool
    score: float | None = None
    groups: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The score, 0 to 1."""
        return float(self.correct) if self.score is None else self.score

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what is as usual is left out."""
        values: dict[str, Any] = {key: getattr(self, key) for key in KEYS}
        if self.score is not None and self.score != self.correct:
            values["score"] = self.score
        return values | ({"groups": list(self.groups)} if self.groups else {})

    @classmethod
    def from_dict(cls, item: Any) -> Answer:
        """The other way round.

        Raises:
            KeyError: one is missing.
            TypeError: one is of the wrong type.
        """
        values = {key: item[key] for key in KEYS}
        image, graded, groups = values["image"], item.get("score"), item.get("groups", [])
        texts = [values[key] for key in ("question", "answer", "prediction")] + ([] if image is None else [image])
        kinds = isinstance(values["correct"], bool) and isinstance(groups, list)
        if not kinds or not all(isinstance(text, str) for text in [*texts, *groups]):
            raise TypeError(f"a sample with the wrong types: {item!r:.200}")
        return cls(**values, score=None if graded is None else float(graded), groups=tuple(groups))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Records that are counted together. `accuracy` is their mean score: the share of right answers, 0 to 1."""

    count: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A record that could not be asked: its number, from 1, and why."""

    number: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All answers of a model to a data set.

    Attributes:
        model: the model folder, as it was given.
        dataset_dir: the folder that pictures are relative to.
        answers: in the order of the data; at least one.
        metric: how they were judged, see :mod:`mm_finetune.evaluation.metrics`.
        failures: records that were left out.
        loss: mean loss of the right answers' tokens, where it was computed.
    """

    model: str
    dataset_dir: Path
    answers: Sequence[Answer]
    metric: str = "exact"
    failures: Sequence[Failure] = ()
    loss: float | None = None

    @property
    def accuracy(self) -> float:
        """The mean score: with most metrics the share of right answers, 0 to 1."""
        return _mean(self.answers)

    @property
    def groups(self) -> dict[str, Group]:
        """Mean scores by group, in the order of the data."""
        found: dict[str, list[Answer]] = {}
        for answer in self.answers:
            for name in answer.groups or (answer.question,):
                found.setdefault(name, []).append(answer)
        return {name: Group(count=len(group), accuracy=_mean(group)) for name, group in found.items()}

    def describe(self) -> str:
        """A few lines for a terminal: the score of all, then by group, the largest first; then what was left out."""
        groups = sorted(self.groups.items(), key=lambda item: -item[1].count)[:20]
        rows = [("all", len(self.answers), self.accuracy)] + [(name, g.count, g.accuracy) for name, g in groups]
        width = min(60, max(len(name) for name, _, _ in rows))
        # A question is data: what would steer the terminal is shown, not sent.
        lines = [f"{_printable(name)[:width]:{width}}  {accuracy:7.1%}  of {count:,}" for name, count, accuracy in rows]
        if self.failures:
            lines.append(f"{len(self.failures):,} records could not be asked and are not counted, the first of them:")
            lines += [f"  record {failure.number}: {_printable(failure.reason)}" for failure in self.failures[:5]]
        return "\n".join(lines)

    def save(self, path: Path, *, overwrite: bool) -> None:
        """Write the file; the dataset folder is stored relative to it, so that both can move together.

        Raises:
            OutputExistsError: it exists and is not to be replaced.
        """
        value: dict[str, Any] = {
            "model": self.model,
            "dataset_dir": Path(os.path.relpath(self.dataset_dir, path.parent)).as_posix(),
            "metric": self.metric,
            "accuracy": self.accuracy,
            "groups": {name: vars(group) for name, group in self.groups.items()},
            "samples": [answer.as_dict() for answer in self.answers],
        }
        if self.loss is not None and math.isfinite(self.loss):
            value["loss"] = self.loss
        if self.failures:
            value["failures"] = [vars(failure) for failure in self.failures]
        write_file(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n", overwrite=overwrite)

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read the file.

        Raises:
            DataError: it is not what ``mm-finetune eval`` writes.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            answers = [Answer.from_dict(item) for item in value["samples"]]
            if not answers:
                raise ValueError("no samples")
            return cls(
                model=str(value["model"]),
                dataset_dir=path.parent / str(value["dataset_dir"]),
                answers=answers,
                metric=str(value.get("metric", "exact")),
                failures=_failures(value.get("failures", [])),
                loss=None if value.get("loss") is None else float(value["loss"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is not a file that mm-finetune eval wrote: {error!r}") from error


def _failures(items: Iterable[Mapping[str, Any]]) -> tuple[Failure, ...]:
    return tuple(Failure(number=int(item["number"]), reason=str(item["reason"])) for item in items)


def _mean(answers: Sequence[Answer]) -> float:
    return sum(answer.value for answer in answers) / len(answers)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
