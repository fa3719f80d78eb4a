"""Plans in words: tables for a terminal, plain values for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mm_finetune.planning.layouts import RESERVE, Candidate, fits
from mm_finetune.planning.memory import LayerLists, Layout, StageMemory

GIB = 1 << 30
# Columns of a stage's memory: what stands above them, and the attribute.
PARTS = (
    ("weights", "weights"), ("gradients", "gradients"), ("optimizer", "optimizer"), ("activations", "activations"),
    ("moment", "moment"), ("step", "step"), ("data", "data"),
)  # fmt: skip


def size(value: float) -> str:
    """In GiB; small ones in MiB."""
    return f"{value / GIB:.2f} GiB" if value >= GIB / 10 else f"{value / 2**20:.1f} MiB"


def layout_words(layout: Layout, recompute: str) -> str:
    """One line's worth."""
    sequence = " sp" if layout.sequence_parallel else ""
    virtual = f" vpp {layout.vpp_size}" if layout.vpp_size > 1 else ""
    _, *others = sum(layout.vit_pp_layers, ())
    dealt = any(others) or 0 in sum(layout.llm_pp_layers, ())
    lists = f", vision {_text(layout.vit_pp_layers)} llm {_text(layout.llm_pp_layers)}" if dealt else ""
    sizes = f"tp {layout.tp_size}{sequence}, pp {layout.pp_size}{virtual}, dp {layout.dp_size}"
    return f"{sizes}, recompute {recompute}{lists}"


def stages_table(layout: Layout, stages: Sequence[StageMemory]) -> str:
    """Memory of a device of each stage, by part, the fullest one marked."""
    largest = max(range(len(stages)), key=lambda number: stages[number].total)
    rows = [["stage", "vision", "layers", *(title for title, _ in PARTS), "at most", "under way"]]
    for number, stage in enumerate(stages):
        layers = [
            " + ".join(str(row[number]) for row in lists) for lists in (layout.vit_pp_layers, layout.llm_pp_layers)
        ]
        values = [size(getattr(stage, name)) for _, name in PARTS]
        mark = "  <- fullest" if number == largest and len(stages) > 1 else ""
        rows.append([str(number), *layers, *values, size(stage.total), f"{stage.micro_batches:g}{mark}"])
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned, but for the last one."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell if place == len(row) - 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def choice_words(found: Sequence[Candidate], best: Candidate | None, device_bytes: float) -> str:
    """What is chosen, and why not something cheaper."""
    limit = f"{size(device_bytes)} less {RESERVE:.0%} for the driver, collectives and gaps"
    if best is None:
        least = min(found, key=lambda candidate: candidate.largest)
        return (
            f"nothing fits {limit}; the smallest: {layout_words(least.layout, least.recompute)} needs"
            f" {size(least.largest)}. More devices, shorter rows, a smaller micro_batch_size, or lora would help"
        )
    cheaper = [candidate for candidate in found if candidate.order < best.order]
    parts = ", ".join(f"{name} {value:.1%}" for name, value in best.cost.items() if value >= 0.0005)
    why = [f"chosen: {layout_words(best.layout, best.recompute)}: {size(best.largest)} of {limit}"]
    why.append(f"  adds {best.added:.1%} to the arithmetic's time" + (f" ({parts})" if parts else ""))
    if cheaper:
        nearest = min(cheaper, key=lambda candidate: candidate.largest)
        words = layout_words(nearest.layout, nearest.recompute)
        why.append(
            f"  {len(cheaper)} layouts add less, and do not fit; the smallest of them, {words}, needs"
            f" {size(nearest.largest)}"
        )
    else:
        why.append("  none adds less")
    why.append(f"  for mm-convert: {convert_options(best.layout)}")
    return "\n".join(why)


def convert_options(layout: Layout) -> str:
    """mm-convert's options that cut a checkpoint so."""
    options = {"llm_pp_layers": _text(layout.llm_pp_layers), "vit_pp_layers": _text(layout.vit_pp_layers)}
    options |= {"tp_size": str(layout.tp_size)}
    if layout.tower_tp_size != layout.tp_size:
        options["vit_tp_size"] = str(layout.tower_tp_size)
    return " ".join(f"--cfg.parallel_config.{name} {value}" for name, value in options.items())


def _text(lists: LayerLists) -> str:
    return str([list(row) for row in lists]).replace(" ", "")


def candidates_table(found: Sequence[Candidate], device_bytes: float, best: Candidate | None, most: int) -> str:
    """The first ones by cost, those that do not fit with their sizes."""
    rows = [["adds", "at most", "", "layout"]]
    shown = list(found[:most])
    if best is not None and best not in shown:
        shown.append(best)
    for candidate in shown:
        state = "chosen" if candidate is best else "" if fits(candidate, device_bytes) else "too large"
        words = layout_words(candidate.layout, candidate.recompute)
        rows.append([f"{candidate.added:.1%}", size(candidate.largest), state, words])
    left = len(found) - len(shown)
    return columns(rows) + (f"\n… and {left} more (--all)" if left else "")


def as_values(layout: Layout, recompute: str, stages: Sequence[StageMemory]) -> dict[str, Any]:
    """For ``--json``; bytes."""
    told = [asdict(stage) | {"total": stage.total} for stage in stages]
    return {
        "tp_size": layout.tp_size, "pp_size": layout.pp_size, "vpp_size": layout.vpp_size, "dp_size": layout.dp_size,
        "sequence_parallel": layout.sequence_parallel, "recompute": recompute,
        "llm_pp_layers": [list(row) for row in layout.llm_pp_layers],
        "vit_pp_layers": [list(row) for row in layout.vit_pp_layers], "vit_tp_size": layout.tower_tp_size,
        "stages": told,
    }  # fmt: skip
