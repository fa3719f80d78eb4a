"""A run and its evaluations as one HTML file that needs nothing else.

>>> from mm_finetune.report import write_report
>>> write_report("run", before="before.json", after="after.json", output="report.html")

Evaluations during the run, ``RUN/evals/step_0000100.json``, stand between the two.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_finetune.config import TrainConfig
from mm_finetune.config_tree import section_of
from mm_finetune.errors import DataError
from mm_finetune.evaluation.answers import Answer, Evaluation
from mm_finetune.output import require_free_file, write_file
from mm_finetune.page import page

MAX_WRONG = 16
MAX_SHOWN = 40


# What a row of metrics.jsonl must have, and what is drawn where it has it.
NEEDED = ("step", "loss", "lr", "tokens", "elapsed_s")
OPTIONAL = ("grad_norm", "tokens_per_second", "mfu", "data_wait", "memory_gib")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What the page shows of ``metrics.jsonl``: a value for each step; NaN where there is none.

    `more` is what the objective noted besides: ``reward_…``.
    """

    steps: Sequence[int]
    loss: Sequence[float]
    lr: Sequence[float]
    grad_norm: Sequence[float] = ()
    tokens_per_second: Sequence[float] = ()
    mfu: Sequence[float] = ()
    data_wait: Sequence[float] = ()
    memory_gib: Sequence[float] = ()
    more: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The answers of the model at one time; `step` is None before and after the run."""

    label: str
    step: int | None = None
    evaluation: Evaluation


@dataclass(frozen=True)
class Case:
    """The same question at every stage, from the first to the last."""

    answers: Sequence[Answer]

    @property
    def last(self) -> Answer:
        """What the model says in the end."""
        return self.answers[-1]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page is made of.

    Attributes:
        name: of the run's folder.
        settings: ``config.yaml``: sections with keys.
        anomalies: the lines of ``anomalies.jsonl``: steps that were refused.
        stages: evaluations of the same records, in order; there may be none.
        during: those of the middle of the run; they are of fewer records where they are no stages.
        wrong: some questions that are answered wrongly in the end.
        sample: some of all questions, every group of questions as often.
        attached: pictures and videos of other commands.
    """

    name: str = ""
    metrics: Metrics
    settings: dict[str, dict[str, Any]]
    anomalies: Sequence[dict[str, Any]] = ()
    stages: Sequence[Stage] = ()
    during: Sequence[Stage] = ()
    wrong: Sequence[Case] = ()
    sample: Sequence[Case] = ()
    attached: Sequence[Path] = ()

    @property
    def planned(self) -> int | None:
        """Steps that the run was to have."""
        steps = self.settings.get("train", {}).get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def model(self) -> str:
        """Name of the model's folder."""
        return Path(str(self.settings.get("model", {}).get("hf_dir", ""))).name

    @property
    def method(self) -> str:
        """What trained, and on what objective."""
        lora, preference = self.settings.get("lora"), self.settings.get("preference")
        frozen = self.settings.get("train", {}).get("freeze") or []
        words = [
            f"LoRA of rank {lora.get('r')}" if lora else "without " + ", ".join(frozen) if frozen else "all weights"
        ]
        return ", ".join([*words, f"{preference.get('loss')} on pairs"] if preference else words)

    @property
    def chosen(self) -> dict[str, dict[str, Any]]:
        """The settings that are not as they are by default."""
        found = {section: _chosen(section, values) for section, values in self.settings.items()}
        return {section: values for section, values in found.items() if values}


def _chosen(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    known = typing.get_type_hints(TrainConfig)
    kind = section_of(TrainConfig, section) if section in known else None
    if kind is None:
        return dict(values)
    usual = {item.name: _default(item) for item in dataclasses.fields(kind)}
    return {key: value for key, value in values.items() if key not in usual or value != usual[key]}


def _default(item: dataclasses.Field[Any]) -> Any:
    """A default as YAML has it; of a key that must be given, nothing is equal to it."""
    value = item.default if item.default_factory is MISSING else item.default_factory()
    return list(value) if isinstance(value, tuple) else value


def write_report(
    run: str | Path,
    *,
    before: str | Path | None = None,
    after: str | Path | None = None,
    output: str | Path,
    attach: Sequence[Path] = (),
    overwrite: bool = False,
) -> Report:
    """Write the page.

    Args:
        run: the folder of the run (``output.dir``).
        before: what ``mm-finetune eval`` wrote for the model before the run; may be left out.
        after: the same for the model after the run, about the same records; may be left out.
        output: the HTML file.
        attach: ``.png`` pictures and ``.mp4`` videos that are shown as well.
        overwrite: replace `output`.

    Raises:
        OutputExistsError: `output` is there already.
        DataError: a file is missing, is not what it should be, or the evaluations are of different records.
    """
    output = Path(output)
    if not Path(run).is_dir():
        raise DataError(f"{run} is no folder; give that of a run (output.dir), with config.yaml and metrics.jsonl")
    require_free_file(output, overwrite=overwrite)
    report = collect(Path(run), before=_path(before), after=_path(after))
    report = replace(report, attached=tuple(attach))
    write_file(output, page(report), overwrite=overwrite)
    return report


def collect(run: Path, *, before: Path | None = None, after: Path | None = None) -> Report:
    """Read all inputs of a page. The errors are those of :func:`write_report`."""
    metrics, settings = read_metrics(run / "metrics.jsonl"), _settings(run / "config.yaml")
    anomalies = [value for _, value in _json_lines(run / "anomalies.jsonl")]
    stages, during = _stages(run, before, after)
    cases = [Case(answers) for answers in zip(*(stage.evaluation.answers for stage in stages), strict=True)]
    wrong = _spread([case for case in cases if not case.last.correct], MAX_WRONG)
    sample = _spread(cases, MAX_SHOWN - len(wrong), without=wrong)
    return Report(
        name=run.resolve().name, metrics=metrics, settings=settings, anomalies=anomalies, stages=stages,
        during=during, wrong=wrong, sample=sample,
    )  # fmt: skip


def eval_path(run: Path, step: int) -> Path:
    """Where an evaluation in the middle of a run stands."""
    return run / "evals" / f"step_{step:07d}.json"


def _stages(run: Path, before: Path | None, after: Path | None) -> tuple[list[Stage], list[Stage]]:
    """What is compared, and what the run itself found: the same evaluations, or a part of the records alone."""
    middle: list[tuple[str, int | None, Path]] = []
    for path in sorted((run / "evals").glob("step_*.json")):
        step = path.stem.removeprefix("step_")
        if step.isdecimal():
            middle.append((f"step {int(step)}", int(step), path))
    during = _loaded(middle)
    first = _loaded([("before", None, before)] if before else [])
    last = _loaded([("after", None, after)] if after else [])
    _require_alike([*first, *last], [path for path in (before, after) if path])
    _require_alike(during, [path for _, _, path in middle])
    ends = [*first, *last]
    if ends and during and _records(ends[0]) != _records(during[0]):
        return ends, during
    return [*first, *during, *last], during


def _loaded(found: Sequence[tuple[str, int | None, Path]]) -> list[Stage]:
    return [Stage(label=label, step=step, evaluation=Evaluation.load(_present(path))) for label, step, path in found]


def _require_alike(stages: Sequence[Stage], paths: Sequence[Path]) -> None:
    for path, stage in zip(paths, stages, strict=True):
        if _records(stage) != _records(stages[0]):
            raise DataError(
                f"{paths[0]} and {path} are answers to different records; evaluate both on the same --data, with the"
                " same --metric"
            )


def _records(stage: Stage) -> list[tuple[object, ...]]:
    evaluation = stage.evaluation
    return [(evaluation.metric, answer.image, answer.question, answer.groups) for answer in evaluation.answers]


def read_metrics(path: Path) -> Metrics:
    """Read ``metrics.jsonl``.

    Raises:
        DataError: it is missing or empty, or a line is not a step.
    """
    found = _json_lines(_present(path))
    rows = [_row(path, number, value) for number, value in found]
    if not rows:
        raise DataError(f"{path} holds no step; the run has not trained")
    optional = {key: [row[key] for row in rows] for key in OPTIONAL if any(math.isfinite(row[key]) for row in rows)}
    return Metrics(
        steps=[int(row["step"]) for row in rows],
        loss=[row["loss"] for row in rows],
        lr=[row["lr"] for row in rows],
        tokens=int(sum(row["tokens"] for row in rows)),
        seconds=rows[-1]["elapsed_s"],
        more=_more([value for _, value in found]),
        **optional,
    )


def _more(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("reward_"))
    found = {name: [row.get(name) for row in rows] for name in names}
    return {
        name: [float(value) if isinstance(value, (int, float)) else math.nan for value in values]
        for name, values in found.items()
    }


def _json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Objects with the numbers of their lines; none where there is no file."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not a step of a run: {error!r}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}: line {number} is not a step of a run: {line:.80}")
        found.append((number, value))
    return found


def _row(path: Path, number: int, value: dict[str, Any]) -> dict[str, float]:
    try:
        needed = {key: math.nan if value[key] is None else float(value[key]) for key in NEEDED}
        optional = {key: math.nan if value.get(key) is None else float(value[key]) for key in OPTIONAL}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: line {number} is not a step of a run: {error!r}") from error
    return needed | optional


def _settings(path: Path) -> dict[str, dict[str, Any]]:
    import yaml

    try:
        tree = yaml.safe_load(_present(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if isinstance(tree, dict):
        # A section that is not used stands there as null.
        tree = {name: section for name, section in tree.items() if section is not None}
    if not isinstance(tree, dict) or not all(isinstance(section, dict) for section in tree.values()):
        raise DataError(f"{path} must hold sections with keys, as mm-finetune train writes it")
    return tree


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _present(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} does not exist; a run holds config.yaml and metrics.jsonl, eval writes the answers")
    return path


def _spread(cases: Sequence[Case], count: int, *, without: Sequence[Case] = ()) -> list[Case]:
    """Up to `count` cases, every question as often as possible, the same ones each time."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        if case not in without:
            groups.setdefault(case.last.question, []).append(case)
    for group in groups.values():
        random.Random(0).shuffle(group)
    chosen: list[Case] = []
    while len(chosen) < count and any(groups.values()):
        chosen += [group.pop() for group in groups.values() if group][: count - len(chosen)]
    return sorted(chosen, key=lambda case: list(groups).index(case.last.question))
