"""The curves of a run as SVG, to stand inside a page, in its colours and its type."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from html import escape

from mm_finetune.errors import ConfigError

# matplotlib wants colours; the page has its own, which change with the reader's light or dark.
COLOURS = {"#010101": "ink", "#020202": "soft", "#030303": "line", "#040404": "accent", "#050505": "wrong",
           "#060606": "faint"}  # fmt: skip
INK, SOFT, LINE, ACCENT, WRONG, FAINT = COLOURS
STYLE = {
    # Fixed, so that the same numbers give the same bytes.
    "svg.hashsalt": "mm-finetune",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}
FEW = 12  # values that get a mark each
WIDE = 10.0  # the largest value over the smallest, from which on the axis is logarithmic


def curve(
    steps: Sequence[int],
    values: Sequence[float],
    *,
    label: str,
    smooth: bool = False,
    log: bool = False,
    percent: bool = False,
    marked: Sequence[int] = (),
) -> str:
    """Draw values over steps.

    Args:
        steps: step numbers.
        values: one for each step.
        label: what they are, for readers who can't see the picture too.
        smooth: put a running mean over the values, which then stand behind it in grey.
        log: the axis is logarithmic where the values are far apart, see :func:`is_logarithmic`.
        percent: the values are shares.
        marked: steps with a red line.

    Returns:
        An ``<svg>`` element; its colours are the page's variables ``--ink``, ``--soft`` and so on, see `COLOURS`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'mm-finetune[report]'") from error

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.subplots()
        for step in marked:
            axes.axvline(step, color=WRONG, linewidth=0.8)
        if smooth:
            axes.plot(steps, values, color=FAINT, linewidth=0.8)
        # A single value, or one between two gaps, has no line.
        marker = "o" if sum(map(math.isfinite, values)) <= FEW else None
        drawn = running_mean(values) if smooth else values
        axes.plot(steps, drawn, color=ACCENT, linewidth=2, marker=marker, markersize=4)
        if log and is_logarithmic(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g}%" if percent else short(value)))
        if percent:
            axes.set_ylim(bottom=0)
        margin = max(0.5, 0.03 * (steps[-1] - steps[0]))
        axes.set_xlim(steps[0] - margin, steps[-1] + margin)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True))
        axes.set_xlabel("step")
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(which="both", length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # Without the XML prologue, which names a document elsewhere and is not allowed inside HTML.
    text = f'<svg role="img" aria-label="{escape(label)} by step"' + text[text.index("<svg") + len("<svg") :]
    for colour, name in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether values are all above 0, and so far apart that a plain axis would show the largest alone."""
    found = [value for value in values if math.isfinite(value)]
    return bool(found) and min(found) > 0 and max(found) / min(found) >= WIDE


def short(value: float) -> str:
    """A number on an axis: ``0.02``, ``1e-05``, ``500``, ``12k``, ``1.5M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def running_mean(values: Sequence[float], share: float = 0.05) -> list[float]:
    """The mean of each value and those before it, over a share of all values; what is no number is left out."""
    window = max(1, round(len(values) * share))
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [_mean([value for value in part if math.isfinite(value)]) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
