"""The HTML of a report: light, self-contained, without scripts. Every text from a file is escaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mm_finetune.attachments import attachments
from mm_finetune.curve import curve
from mm_finetune.evaluation.answers import Answer, Group
from mm_finetune.evaluation.metrics import TITLES
from mm_finetune.images import read_rgb

if TYPE_CHECKING:
    from mm_finetune.report import Case, Report, Stage

MAX_GROUPS = 12
MAX_STAGES = 5  # answers on a card
MAX_ANOMALIES, MAX_LISTED = 50, 12
THUMBNAIL_PIXELS = 224
# Even if a text slipped through unescaped: no script, no request.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { --ink: #1d2430; --soft: #667085; --line: #e4e7ec; --accent: #0b6e69; --wrong: #a8321f; --paper: #fff }
* { box-sizing: border-box }
body { margin: 0; background: #f6f7f8; color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem }
p { margin: .3rem 0; max-width: 44rem }
.soft { color: var(--soft) }
.panel { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.25rem }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)) }
.headline { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1rem; margin-bottom: .9rem }
.headline b { font-size: 3rem; line-height: 1.1; letter-spacing: -.02em; font-variant-numeric: tabular-nums }
.headline .old { color: var(--soft); font-weight: 500 }
.headline .new { color: var(--accent) }
.group { padding: .75rem 0; border-top: 1px solid var(--line); overflow-wrap: anywhere }
.group h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .3rem }
.bar { display: grid; grid-template-columns: 3.4rem 1fr 9.5rem; gap: .6rem; align-items: center; font-size: .875rem }
.track { height: .6rem; border-radius: .3rem; background: #eef0f2; overflow: hidden }
.track i { display: block; height: 100%; background: #98a2b3 }
.track i.new { background: var(--accent) }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
figure { margin: 0 } figure.small { max-width: 26rem; margin-bottom: .9rem }
table.rows { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums }
table.rows th, table.rows td { text-align: left; padding: .22rem .75rem .22rem 0; vertical-align: top }
table.rows td { border-top: 1px solid var(--line) } .scroll { overflow-x: auto }
figure svg { width: 100%; height: auto; display: block }
figcaption { font-weight: 600; margin-bottom: .4rem } figcaption .soft { font-weight: 400; font-size: .875rem }
h2 + p { margin: -.4rem 0 .75rem }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: .8rem; margin: 0 }
dl.facts dt, table.settings th, .said dt { color: var(--soft); font-size: .8125rem; font-weight: 400 }
dl.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums }
table.settings { border-collapse: collapse; width: 100%; font-size: .875rem }
table.settings caption { text-align: left; font-weight: 600; padding-bottom: .25rem }
table.settings th, table.settings td { text-align: left; padding: .22rem 0; border-top: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere }
table.settings th { width: 52%; padding-right: .75rem }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(172px, 1fr));
  list-style: none; margin: 0; padding: 0 }
.card { background: var(--paper); border: 1px solid var(--line); border-top: 4px solid var(--accent);
  border-radius: 10px; padding: .7rem; overflow-wrap: anywhere; font-size: .875rem }
.card.wrong { border-top: 4px dashed var(--wrong) }
.card img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #f1f3f5; border-radius: 6px; display: block }
.card .question { margin: .55rem 0 .35rem; line-height: 1.35 }
.said { display: grid; grid-template-columns: minmax(3.1rem, max-content) 1fr; gap: .1rem .3rem; margin: 0 }
.said dd { margin: 0; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden }
.verdict { margin: 0 0 .45rem; font-weight: 600; font-size: .8125rem; color: var(--accent) }
.card.wrong .verdict, .said .wrong { color: var(--wrong) } .said .right { color: var(--accent) }
.attached img, .attached video { width: 100%; display: block; image-rendering: pixelated; border-radius: 6px }
@media (max-width: 480px) { .bar { grid-template-columns: 3rem 1fr 8.6rem; gap: .4rem }
  .cards { grid-template-columns: repeat(2, 1fr) } .headline b { font-size: 2.5rem } }
@media print { body { background: #fff } .card, .panel { break-inside: avoid } }
"""


def page(report: Report) -> str:
    """The whole document.

    Raises:
        DataError: a picture can't be read, or an attachment can't be shown.
    """
    sections = (
        _header(report),
        _accuracy(report.stages, report.during),
        _training(report),
        _anomalies(report.anomalies),
        attachments(report.attached),
        _cards("Still wrong at the end", _wrong_words(report), report.wrong, report),
        _cards("A sample of the rest", "Each question equally often, not picked by hand.", report.sample, report),
        _settings(report),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Fine-tuning report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
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
    return f'<header><h1>Fine-tuning report</h1><p class="soft">{models}</p></header>'


def _accuracy(stages: Sequence[Stage], during: Sequence[Stage]) -> str:
    if not stages:
        return ""
    first, last = stages[0], stages[-1]
    metric = last.evaluation.metric
    new = last.evaluation.groups
    names = sorted(new, key=lambda name: -new[name].count)[:MAX_GROUPS]
    more = len(new) - len(names)
    rest = f'<p class="soft">… and {more:,} others.</p>' if more else ""
    ends = [first, last] if first is not last else [last]
    old = f'<b class="old">{first.evaluation.accuracy:.1%}</b><span aria-hidden="true">→</span>'
    return (
        f'<h2>{escape(TITLES.get(metric, metric))}</h2><section class="panel"><div class="headline">'
        f"{old if first is not last else ''}"
        f'<b class="new">{last.evaluation.accuracy:.1%}</b>'
        f'<span class="soft">{" → ".join(stage.label for stage in ends)},'
        f" of {len(last.evaluation.answers):,} records</span></div>"
        + _over_time(during)
        + "".join(_group(name, ends) for name in names)
        + f'{rest}<p class="soft">In brackets: 95 % interval (Wilson).</p></section>'
    )


def _over_time(during: Sequence[Stage]) -> str:
    """Score and loss of the evaluations in the middle of the run."""
    steps = [stage.step or 0 for stage in during]
    scores = [stage.evaluation.accuracy for stage in during]
    losses = [math.nan if stage.evaluation.loss is None else stage.evaluation.loss for stage in during]
    exact = bool(during) and during[-1].evaluation.metric == "exact"
    drawn = [("Share of right answers" if exact else "Score", scores), ("Loss of the right answers", losses)]
    figures = "".join(
        f'<figure class="small">{curve(steps, values, label=name)}<figcaption class="soft">{name}</figcaption></figure>'
        for name, values in drawn
        if len(steps) > 1 and all(map(math.isfinite, values))
    )
    return f'<div class="columns">{figures}</div>' if figures else ""


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
    minutes, seconds = divmod(round(metrics.seconds), 60)
    facts = {
        "steps": f"{metrics.steps[-1]:,}",
        "last loss": f"{metrics.loss[-1]:.3f}",
        "tokens": f"{metrics.tokens:,}",
        "time": f"{minutes}:{seconds:02d} min",
        "tokens a second": f"{metrics.tokens / metrics.seconds:,.0f}" if metrics.seconds else "–",
    }
    facts |= {name: f"{_middle(values):.1%}" for name, values in _shares(report) if values}
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return (
        f'<h2>Training</h2><section class="panel"><dl class="facts">{items}</dl></section>'
        f'<div class="columns" style="margin-top:1rem">{_curves(report)}</div>'
    )


def _shares(report: Report) -> tuple[tuple[str, Sequence[float]], ...]:
    return ("median MFU", report.metrics.mfu), ("median data wait", report.metrics.data_wait)


def _middle(values: Sequence[float]) -> float:
    return median(value for value in values if math.isfinite(value))


def _curves(report: Report) -> str:
    """Loss, learning rate, and whatever else the run noted."""
    metrics = report.metrics
    noted = '<span class="soft">(grey: each step; line: running mean)</span>'
    drawn = [
        (f"Loss {noted}", curve(metrics.steps, metrics.loss, label="Loss", smooth=True, log=True)),
        ("Learning rate", curve(metrics.steps, metrics.lr, label="Learning rate")),
    ]
    for name, values in (("Gradient norm", metrics.grad_norm), ("Tokens a second", metrics.tokens_per_second)):
        if values:
            drawn.append((name, curve(metrics.steps, values, label=name, smooth=True, log=name == "Gradient norm")))
    return "".join(
        f'<figure class="panel"><figcaption>{name}</figcaption>{svg}</figure>' for name, svg in drawn
    )  # fmt: skip


def _anomalies(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    shown = "".join(_anomaly(row) for row in rows[:MAX_ANOMALIES])
    words = f"{len(rows):,} steps left the weights as they were; {min(len(rows), MAX_ANOMALIES)} of them are shown."
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("step", "what", "loss", "gradient norm", "records"))
    return (
        f'<h2>Refused steps</h2><p class="soft">{words}</p><section class="panel scroll">'
        f'<table class="rows"><thead><tr>{heads}</tr></thead><tbody>{shown}</tbody></table></section>'
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
    panels = "".join(
        '<div class="panel"><table class="settings">'
        f"<caption>{escape(str(section))}</caption>{_rows(values.items())}</table></div>"
        for section, values in report.settings.items()
    )
    return f'<h2>Settings</h2><section class="columns">{panels}</section>'


def _rows(items: Iterable[tuple[str, object]]) -> str:
    return "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape("–" if value is None else str(value))}</td></tr>'
        for key, value in items
    )


def _wrong_words(report: Report) -> str:
    answers = report.stages[-1].evaluation.answers if report.stages else ()
    wrong = sum(not answer.correct for answer in answers)
    return f"{wrong:,} of {len(answers):,} records; {len(report.wrong)} of them are shown."


def _cards(title: str, words: str, cases: Sequence[Case], report: Report) -> str:
    if not cases:
        return ""
    root, labels = report.stages[-1].evaluation.dataset_dir, [stage.label for stage in report.stages]
    cards = "".join(_card(case, labels, root) for case in cases)
    return f'<h2>{title}</h2><p class="soft">{words}</p><ul class="cards">{cards}</ul>'


def _card(case: Case, labels: Sequence[str], root: Path) -> str:
    last = case.last
    picture = "" if last.image is None else f'<img alt="" loading="lazy" src="{_data_uri(root / last.image)}">'
    kind, verdict = ("", "✓ right") if last.correct else (" wrong", "✗ wrong")
    said = "".join(f"<dt>{labels[n]}</dt><dd>{_said(case.answers[n])}</dd>" for n in _few(len(labels)))
    return (
        f'<li class="card{kind}"><p class="verdict">{verdict}</p>{picture}'
        f'<p class="question">{escape(last.question)}</p><dl class="said">'
        f"<dt>answer</dt><dd>{escape(last.answer)}</dd>{said}</dl></li>"
    )


def _few(count: int) -> list[int]:
    """The first, the last, and some between, evenly."""
    if count <= MAX_STAGES:
        return list(range(count))
    return [round(place * (count - 1) / (MAX_STAGES - 1)) for place in range(MAX_STAGES)]


def _said(answer: Answer) -> str:
    kind, mark = ("right", "✓") if answer.correct else ("wrong", "✗")
    text = escape(answer.prediction) or '<span class="soft">(nothing)</span>'
    return f'<span class="{kind}" role="img" aria-label="{kind}:">{mark}</span>&nbsp;{text}'


def _data_uri(path: Path) -> str:
    picture = read_rgb(path)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
