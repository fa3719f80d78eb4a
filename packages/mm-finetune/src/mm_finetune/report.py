"""A run and its evaluations as one HTML file that needs nothing else.

>>> from mm_finetune.report import write_report
>>> write_report("run", before="before.json", after="after.json", output="report.html")
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_finetune.answers import Answer, Evaluation
from mm_finetune.errors import DataError
from mm_finetune.output import require_free_file, write_file
from mm_finetune.page import page

MAX_WRONG = 16
MAX_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What the page shows of ``metrics.jsonl``: a value for each step."""

    steps: Sequence[int]
    loss: Sequence[float]
    lr: Sequence[float]
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same question, before and after."""

    before: Answer
    after: Answer


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page is made of.

    Attributes:
        settings: ``config.yaml``: sections with keys.
        before: the evaluation of the model that the run began with.
        after: the evaluation of what it made.
        wrong: some questions that are answered wrongly after the run.
        sample: some of all questions, every group of questions as often.
        attached: pictures and videos of other commands.
    """

    metrics: Metrics
    settings: dict[str, dict[str, Any]]
    before: Evaluation
    after: Evaluation
    wrong: Sequence[Pair]
    sample: Sequence[Pair]
    attached: Sequence[Path] = ()


def write_report(
    run: str | Path,
    *,
    before: str | Path,
    after: str | Path,
    output: str | Path,
    attach: Sequence[Path] = (),
    overwrite: bool = False,
) -> Report:
    """Write the page.

    Args:
        run: the folder of the run (``output.dir``).
        before: what ``mm-finetune eval`` wrote for the model before the run.
        after: the same for the model after the run, about the same records.
        output: the HTML file.
        attach: ``.png`` pictures and ``.mp4`` videos that are shown as well.
        overwrite: replace `output`.

    Raises:
        OutputExistsError: `output` is there already.
        DataError: a file is missing, is not what it should be, or the two evaluations are of different records.
    """
    output = Path(output)
    require_free_file(output, overwrite=overwrite)
    report = replace(collect(Path(run), before=Path(before), after=Path(after)), attached=tuple(attach))
    write_file(output, page(report), overwrite=overwrite)
    return report


def collect(run: Path, *, before: Path, after: Path) -> Report:
    """Read all inputs of a page. The errors are those of :func:`write_report`."""
    metrics, settings = read_metrics(run / "metrics.jsonl"), _settings(run / "config.yaml")
    old, new = Evaluation.load(_present(before)), Evaluation.load(_present(after))
    pairs = [Pair(before=one, after=two) for one, two in zip(old.answers, new.answers, strict=False)]
    same = all((p.before.image, p.before.question) == (p.after.image, p.after.question) for p in pairs)
    if len(old.answers) != len(new.answers) or not same:
        raise DataError(f"{before} and {after} are answers to different records; evaluate both on the same --data")
    wrong = _spread([pair for pair in pairs if not pair.after.correct], MAX_WRONG)
    sample = _spread(pairs, MAX_SHOWN - len(wrong), without=wrong)
    return Report(metrics=metrics, settings=settings, before=old, after=new, wrong=wrong, sample=sample)


def read_metrics(path: Path) -> Metrics:
    """Read ``metrics.jsonl``.

    Raises:
        DataError: it is missing or empty, or a line is not a step.
    """
    lines = _present(path).read_text(encoding="utf-8").splitlines()
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    if not rows:
        raise DataError(f"{path} holds no step; the run has not trained")
    return Metrics(
        steps=[int(row["step"]) for row in rows],
        loss=[row["loss"] for row in rows],
        lr=[row["lr"] for row in rows],
        tokens=int(sum(row["tokens"] for row in rows)),
        seconds=rows[-1]["elapsed_s"],
    )


def _row(path: Path, number: int, line: str) -> dict[str, float]:
    try:
        value = json.loads(line)
        return {key: float(value[key]) for key in ("step", "loss", "lr", "tokens", "elapsed_s")}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: line {number} is not a step of a run: {error!r}") from error


def _settings(path: Path) -> dict[str, dict[str, Any]]:
    import yaml

    try:
        tree = yaml.safe_load(_present(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict) or not all(isinstance(section, dict) for section in tree.values()):
        raise DataError(f"{path} must hold sections with keys, as mm-finetune train writes it")
    return tree


def _present(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} does not exist; a run holds config.yaml and metrics.jsonl, eval writes the answers")
    return path


def _spread(pairs: Sequence[Pair], count: int, *, without: Sequence[Pair] = ()) -> list[Pair]:
    """Up to `count` pairs, every question as often as possible, the same ones each time."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair not in without:
            groups.setdefault(pair.after.question, []).append(pair)
    for group in groups.values():
        random.Random(0).shuffle(group)
    chosen: list[Pair] = []
    while len(chosen) < count and any(groups.values()):
        chosen += [group.pop() for group in groups.values() if group][: count - len(chosen)]
    return sorted(chosen, key=lambda pair: list(groups).index(pair.after.question))
