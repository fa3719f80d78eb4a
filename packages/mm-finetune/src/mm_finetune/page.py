"""The HTML of a report: light, self-contained, without scripts. Every text from a file is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import TYPE_CHECKING, Any

from mm_finetune.attachments import attachments
from mm_finetune.cards import cards
from mm_finetune.curve import curve, is_logarithmic
from mm_finetune.evaluation.answers import Group
from mm_finetune.evaluation.metrics import TITLES
from mm_finetune.page_style import POLICY, STYLE
from mm_finetune.watching.lines import duration

if TYPE_CHECKING:
    from mm_finetune.report import Metrics, Report, Stage

MAX_GROUPS = 12
MAX_ANOMALIES, MAX_LISTED = 50, 12
MANY = 40  # steps from which on a running mean says more than they do
# Of what a run notes: name, words behind it, and whether it jumps from step to step.
CURVES: Mapping[str, tuple[str, str, bool]] = {
    "loss": ("Loss", "nats a token", True),
    "lr": ("Learning rate", "", False),
    "grad_norm": ("Gradient norm", "before clipping", True),
    "tokens_per_second": ("Tokens a second", "", True),
    "reward_margin": ("Reward margin", "the chosen answer's reward less the rejected one's", True),
    "reward_accuracy": ("Reward accuracy", "pairs whose chosen answer has the higher reward", True),
}
LOGARITHMIC = ("loss", "grad_norm")


def page(report: Report) -> str:
    """The whole document.

    Raises:
        DataError: a picture can't be read, or an attachment can't be shown.
    """
    title = f"{escape(report.name)} · fine-tuning report" if report.name else "Fine-tuning report"
    labels = [stage.label for stage in report.stages]
    root = report.stages[-1].evaluation.dataset_dir if report.stages else None
    sections = (
        _header(report),
        _accuracy(report.stages, report.during),
        _training(report),
        _anomalies(report.anomalies),
        attachments(report.attached),
        cards("Still wrong at the end", _wrong_words(report), report.wrong, labels, root),
        cards("A sample of the rest", "Each question equally often, not picked by hand.", report.sample, labels, root),
        _settings(report),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def interval(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen `count` times (Wilson, J. Am. Stat. Assoc. 22, 1927, p. 209)."""
    z = 1.959964
    middle = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(right * (1 - right) / count + z * z / (4 * count * count))
    # Rounding would put the ends of 0 % and 100 % a hair beside them.
    return max(0.0, min(right, middle - half)), min(1.0, max(right, middle + half))


def _header(report: Report) -> str:
    ends = [*report.stages[:1], *report.stages[-1:]]
    models = " → ".join(dict.fromkeys(escape(stage.evaluation.model) for stage in ends))
    words = [escape(text) for text in (report.model, report.method) if text]
    return (
        f"<header><h1>Fine-tuning report{': ' + escape(report.name) if report.name else ''}</h1>"
        f'<p class="soft">{" · ".join(words)}</p>' + (f'<p class="soft">{models}</p>' if models else "") + "</header>"
    )


def _accuracy(stages: Sequence[Stage], during: Sequence[Stage]) -> str:
    if not stages:
        return ""
    first, last = stages[0], stages[-1]
    metric = last.evaluation.metric
    new = last.evaluation.groups
    names = sorted(new, key=lambda name: -new[name].count)[:MAX_GROUPS]
    more = len(new) - len(names)
    rest = f'<p class="soft small">… and {more:,} others.</p>' if more else ""
    ends = [first, last] if first is not last else [last]
    old = f'<b class="old">{first.evaluation.accuracy:.1%}</b><span aria-hidden="true">→</span>'
    return (
        f'<h2>{escape(TITLES.get(metric, metric))}</h2><section class="panel"><div class="headline">'
        f"{old if first is not last else ''}"
        f'<b class="new">{last.evaluation.accuracy:.1%}</b>'
        f'<span class="soft">{" → ".join(stage.label for stage in ends)},'
        f" of {len(last.evaluation.answers):,} records</span></div>"
        + "".join(_group(name, ends) for name in names)
        + f'{rest}<p class="soft small">In brackets: 95 % interval (Wilson).{_left_out(last)}</p></section>'
        + _over_time(during)
    )


def _left_out(stage: Stage) -> str:
    failures = stage.evaluation.failures
    return f" {len(failures):,} records could not be asked and are not counted." if failures else ""


def _over_time(during: Sequence[Stage]) -> str:
    """Score and loss of the evaluations in the middle of the run."""
    steps = [stage.step or 0 for stage in during]
    scores = [stage.evaluation.accuracy for stage in during]
    losses = [math.nan if stage.evaluation.loss is None else stage.evaluation.loss for stage in during]
    exact = bool(during) and during[-1].evaluation.metric == "exact"
    drawn = [
        ("Share of right answers" if exact else "Score", "", scores, True),
        ("Loss of the right answers", "nats a token", losses, False),
    ]
    figures = "".join(
        _figure(name, unit, curve(steps, values, label=name, percent=percent))
        for name, unit, values, percent in drawn
        if len(steps) > 1 and all(map(math.isfinite, values))
    )
    return f'<div class="curves">{figures}</div>' if figures else ""


def _group(name: str, ends: Sequence[Stage]) -> str:
    groups = [stage.evaluation.groups[name] for stage in ends]
    bars = "".join(
        _bar(stage.label, ' class="new"' if stage is ends[-1] else "", group)
        for stage, group in zip(ends, groups, strict=True)
    )
    count = f'<span class="soft">· {groups[-1].count:,}</span>'
    return f'<div class="group"><h3>{escape(name)} {count}</h3>{bars}</div>'


def _bar(label: str, style: str, group: Group) -> str:
    low, high = interval(group.accuracy, group.count)
    return (
        f'<div class="bar"><span class="soft">{label}</span>'
        f'<span class="track"><i{style} style="width:{group.accuracy:.2%}"></i></span>'
        f'<span class="number"><strong>{group.accuracy:.1%}</strong>'
        f' <span class="soft">({low * 100:.0f}–{high * 100:.0f})</span></span></div>'
    )


def _training(report: Report) -> str:
    metrics = report.metrics
    done, planned = metrics.steps[-1], report.planned
    facts = {
        "steps": f"{done:,} of {planned:,}" if planned and planned != done else f"{done:,}",
        "last loss": f"{metrics.loss[-1]:.3f}" if math.isfinite(metrics.loss[-1]) else "no number",
        "tokens": f"{metrics.tokens:,}",
        "time": f"{duration(metrics.seconds)} {'h' if metrics.seconds >= 3600 else 'min'}",
        "tokens a second": _rate(metrics),
    }
    shares = (("median MFU", metrics.mfu), ("median data wait", metrics.data_wait))
    facts |= {name: f"{_middle(values):.1%}" for name, values in shares if values}
    if metrics.memory_gib:
        facts["memory of rank 0"] = f"{max(value for value in metrics.memory_gib if math.isfinite(value)):.1f} GiB"
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return (
        f'<h2>Training</h2><section class="panel"><dl class="facts">{items}</dl></section>'
        f'<div class="curves">{_curves(report)}</div>'
    )


def _rate(metrics: Metrics) -> str:
    """The median of the steps, so that evaluations and a slow first step don't count; else the mean."""
    if metrics.tokens_per_second:
        return f"{_middle(metrics.tokens_per_second):,.0f}"
    return f"{metrics.tokens / metrics.seconds:,.0f}" if metrics.seconds else "–"


def _middle(values: Sequence[float]) -> float:
    return median(value for value in values if math.isfinite(value))


def _curves(report: Report) -> str:
    """Loss, learning rate, and whatever else the run noted."""
    metrics = report.metrics
    long = len(metrics.steps) >= MANY
    noted = {
        "loss": metrics.loss, "lr": metrics.lr, "grad_norm": metrics.grad_norm,
        "tokens_per_second": metrics.tokens_per_second, **metrics.more,
    }  # fmt: skip
    refused = [int(row["step"]) for row in report.anomalies if isinstance(row.get("step"), int)]
    figures = []
    for key, (name, unit, jumps) in CURVES.items():
        values = noted.get(key, ())
        if not values:
            continue
        log = key in LOGARITHMIC
        words = [
            "of a pair" if key == "loss" and metrics.more else unit,
            "logarithmic" if log and is_logarithmic(values) else "",
            "line: running mean" if long and jumps else "",
            "red: refused steps" if refused and key == "loss" else "",
        ]
        svg = curve(
            metrics.steps, values, label=name, smooth=long and jumps, log=log, percent=key == "reward_accuracy",
            marked=refused if key == "loss" else (),
        )  # fmt: skip
        figures.append(_figure(name, "; ".join(filter(None, words)), svg))
    return "".join(figures)


def _figure(name: str, words: str, svg: str) -> str:
    words = f' <span class="soft">{words}</span>' if words else ""
    return f'<figure class="panel"><figcaption>{name}{words}</figcaption>{svg}</figure>'


def _anomalies(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    shown = "".join(_anomaly(row) for row in rows[:MAX_ANOMALIES])
    shown_words = (
        f"{len(rows):,} steps left the weights as they were; {min(len(rows), MAX_ANOMALIES)} of them are shown."
    )
    words = "One step left the weights as they were." if len(rows) == 1 else shown_words
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("step", "what", "loss", "gradient norm", "records"))
    return (
        f'<h2>Refused steps</h2><p class="soft">{words}</p><section class="panel scroll">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{shown}</tbody></table></section>"
    )


def _anomaly(row: dict[str, Any]) -> str:
    samples = row.get("samples")
    listed = list(samples) if isinstance(samples, list) else []
    more = f" … {len(listed):,} in all" if len(listed) > MAX_LISTED else ""
    records = ", ".join(map(str, listed[:MAX_LISTED])) + more
    cells = [row.get("step"), row.get("kind"), row.get("loss"), row.get("grad_norm"), records]
    texts = (f"{cell:.4g}" if isinstance(cell, float) else "no number" if cell is None else str(cell) for cell in cells)
    return "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>"


def _settings(report: Report) -> str:
    if not report.settings:
        return ""
    chosen = _panels(report.chosen)
    return (
        '<h2>Settings</h2><p class="soft">What differs from the defaults.</p>'
        f'<section class="columns">{chosen}</section>'
        '<details class="fold"><summary>All settings</summary>'
        f'<section class="columns">{_panels(report.settings)}</section></details>'
    )


def _panels(sections: Mapping[str, Mapping[str, Any]]) -> str:
    return "".join(
        f'<div class="panel"><table class="settings"><caption>{escape(str(section))}</caption>'
        f"{_rows(values.items())}</table></div>"
        for section, values in sections.items()
    )


def _rows(items: Iterable[tuple[str, object]]) -> str:
    return "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_setting(value))}</td></tr>' for key, value in items
    )


def _setting(value: object) -> str:
    """A value as one would write it in the YAML file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_setting(item)}" for key, item in value.items()) or "–"
    return "–" if value is None else str(value)


def _wrong_words(report: Report) -> str:
    answers = report.stages[-1].evaluation.answers if report.stages else ()
    wrong = sum(not answer.correct for answer in answers)
    return f"{wrong:,} of {len(answers):,} records; {len(report.wrong)} of them are shown."
