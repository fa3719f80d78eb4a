"""The curves of a run as SVG, to stand inside a page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from mm_finetune.errors import ConfigError

INK, SOFT, ACCENT = "#1d2430", "#c9ced6", "#0b6e69"
# Fixed, so that the same numbers give the same bytes.
STYLE = {"svg.hashsalt": "mm-finetune", "font.size": 9, "axes.edgecolor": SOFT, "text.color": INK}


def curve(steps: Sequence[int], values: Sequence[float], *, label: str, smooth: bool = False, log: bool = False) -> str:
    """Draw values over steps.

    Args:
        steps: step numbers.
        values: one for each step.
        label: what they are, for readers who can't see the picture too.
        smooth: put a running mean over the values, which then stand behind it in grey.
        log: logarithmic vertical axis; values that are not positive are left out.

    Returns:
        An ``<svg>`` element.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'mm-finetune[demo]'") from error

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        if smooth:
            axes.plot(steps, values, color=SOFT, linewidth=1)
        axes.plot(steps, running_mean(values) if smooth else values, color=ACCENT, linewidth=1.8)
        if log and any(value > 0 for value in values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("step")
        axes.grid(axis="y", color="#e9ebee", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(which="both", length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # Without the XML prologue, which names a document elsewhere and is not allowed inside HTML.
    return f'<svg role="img" aria-label="{label} by step"' + text[text.index("<svg") + len("<svg") :]


def running_mean(values: Sequence[float], share: float = 0.05) -> list[float]:
    """The mean of each value and those before it, over a share of all values; what is no number is left out."""
    window = max(1, round(len(values) * share))
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [_mean([value for value in part if math.isfinite(value)]) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
