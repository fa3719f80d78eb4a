"""Pictures: quality over executed share, decisions of a generation. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_cache.errors import PlotError, PlotUnavailable

if TYPE_CHECKING:
    from dit_cache.meter.ledger import Entry

FORMATS = (".svg", ".png")
WIDTH, BRANCH_HEIGHT, ERRORS_HEIGHT = 6.4, 0.28, 2.0  # inches
INK, SOFT, GRID = "#1d2430", "#c9ced6", "#e9ebee"
# Colours of Okabe and Ito, which the colour-blind can tell apart; markers and dashes tell the lines apart in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
STYLE = {
    "svg.hashsalt": "dit-cache",  # fixed, so that the same numbers give the same bytes
    "font.size": 9.5,
    "axes.edgecolor": SOFT,
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
}


def plot_front(
    path: str | PathLike[str],
    fronts: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str = "executed share of operations",
    ylabel: str = "PSNR, dB",
    title: str = "",
) -> None:
    """Draw quality over executed share, a line for each method, into an svg or png file.

    Args:
        path: where to, by suffix; the file is replaced when the picture is complete.
        fronts: for each method (share, quality) in any order; values that are not finite are left out.
        xlabel: below.
        ylabel: beside.
        title: above.

    Raises:
        PlotError: the suffix is another, or there is no point.
        PlotUnavailable: matplotlib is not installed.
    """
    lines = {
        name: sorted(point for point in points if all(map(math.isfinite, point))) for name, points in fronts.items()
    }
    if not any(lines.values()):
        raise PlotError(f"no finite point in {', '.join(fronts) or 'no method'}: give (share, quality) pairs")
    with _picture(path, height=3.9) as figure:
        (axes,) = _axes(figure, [1.0])
        for index, (name, points) in enumerate(lines.items()):
            # A method without a point still has its place in the legend, and the others keep their colours.
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, **_line(index))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, loc="left", fontweight="bold")
        figure.legend(frameon=False, loc="outside right upper", handlelength=3)


def plot_decisions(path: str | PathLike[str], entries: Sequence[Entry]) -> None:
    """Draw which steps of each branch were computed, and below the errors where some are known; see `Ledger.plot`.

    Raises:
        PlotError: the suffix is another, or there is no entry.
        PlotUnavailable: matplotlib is not installed.
    """
    if not entries:
        raise PlotError("nothing was recorded: run a generation first")
    errors = {name: _known(entries, f"{name}_error") for name in ("predicted", "realised")}
    heights = [BRANCH_HEIGHT * len({entry.branch for entry in entries})] + [ERRORS_HEIGHT] * any(errors.values())
    with _picture(path, height=0.9 + sum(heights)) as figure:
        axes = _axes(figure, heights)
        _draw_decisions(axes[0], entries)
        if any(errors.values()):
            _draw_errors(axes[1], errors)
        axes[-1].set_xlabel("step")
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=2, loc="outside upper right")


def _draw_decisions(axes: Any, entries: Sequence[Entry]) -> None:
    branches = list(dict.fromkeys(entry.branch for entry in entries))
    for computed, fill, label in ((True, INK, "computed"), (False, "white", "skipped")):
        chosen = [(entry.step, branches.index(entry.branch)) for entry in entries if entry.computed is computed]
        steps, rows = [step for step, _ in chosen], [row for _, row in chosen]
        axes.scatter(steps, rows, s=26, marker="s", facecolor=fill, edgecolor=INK, linewidth=0.8, label=label)
    axes.set_yticks(range(len(branches)), branches)
    axes.set_ylim(len(branches) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)


def _draw_errors(axes: Any, errors: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for index, (name, points) in enumerate(errors.items()):
        style = {**_line(index), "linestyle": "none"}
        axes.plot([step for step, _ in points], [error for _, error in points], label=name, **style)
    if all(error > 0 for points in errors.values() for _, error in points):
        axes.set_yscale("log")
        for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_format(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    axes.set_ylabel("relative error")
    axes.legend(frameon=False)


def _known(entries: Sequence[Entry], name: str) -> list[tuple[int, float]]:
    values = ((entry.step, getattr(entry, name)) for entry in entries)
    return [(step, float(value)) for step, value in values if value is not None and math.isfinite(value)]


def _line(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.6,
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
    }


@contextmanager
def _picture(path: str | PathLike[str], *, height: float) -> Iterator[Any]:
    """A figure that is written on leaving, under a temporary name and then renamed; nothing is left of a failed one."""
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise PlotError(f"{target} has the suffix {target.suffix!r}, legal are {' and '.join(FORMATS)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PlotUnavailable(f'{error.name} is not installed: pip install "dit-cache[plot]"') from error
    kind = target.suffix.lower()[1:]
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[kind]
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=160)
        yield figure
        try:
            figure.savefig(unfinished, format=kind, metadata=metadata)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def _axes(figure: Any, heights: Sequence[float]) -> list[Any]:
    """Axes one below the other that share their horizontal scale."""
    column = list(figure.subplots(len(heights), squeeze=False, sharex=True, height_ratios=heights)[:, 0])
    for axes in column:
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", length=0)
    return column
