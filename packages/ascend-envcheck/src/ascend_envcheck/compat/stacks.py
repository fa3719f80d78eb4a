"""MindSpeed-MM and MindIE-SD: which torch_npu, CANN and Python they run on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Mapping

from ascend_envcheck.tables import TorchNpuRow, records
from ascend_envcheck.versions import cann_order, cann_version, release, series

STACKS = ("mindspeed_mm", "mindie_sd")
NAMED, SAME_SERIES, IN_SPAN = 1, 2, 3
"""How well a stack fits a pair: its maker names it; names its series; says that it runs on a span of versions."""


@dataclass(frozen=True)
class Span:
    """What a stack says it runs on, beside the set that it was made with."""

    torch: tuple[str, str]
    cann: str  # and newer
    python: str  # and newer


SPANS: Mapping[str, Span] = {"3.0.0": Span(torch=("2.6", "2.9"), cann="8.0.0", python="3.10")}
"""By the version of MindIE-SD; Ascend/MindIE-SD installation.md."""


def record_of(name: str, version: str) -> Mapping[str, str]:
    """The row of a stack's version."""
    return next(record for record in records(name) if record[name] == version)


def fitting(name: str, row: TorchNpuRow, cann: str) -> tuple[str, ...]:
    """The versions of a stack that fit a pair: the best fit first, of equal ones the newest."""
    graded = [(fit(record, row, cann), record[name]) for record in records(name)]
    found = sorted((grade, place) for place, (grade, _) in enumerate(graded) if grade)
    return tuple(graded[place][1] for _, place in found)


def fit(record: Mapping[str, str], row: TorchNpuRow, cann: str) -> int:
    """How well a row of a stack's table fits a pair, 0 when it does not; an empty cell admits all."""
    trains, toolkits = record["torch_npu_release"].split(), record["cann"].split()
    if row.torch in record["torch"].split():
        if (not trains or row.release in trains) and (not toolkits or cann in toolkits):
            return NAMED
        if (not trains or line(row.release) in map(line, trains)) and (
            not toolkits or line(cann) in map(line, toolkits)
        ):
            return SAME_SERIES
    span = SPANS.get(record.get("mindie_sd", ""))
    if span is None:
        return 0
    first, last, own = (release(version) or (0, 0, 0) for version in (*span.torch, row.torch))
    return IN_SPAN if first[:2] <= own[:2] <= last[:2] and cann_order(cann) >= cann_order(span.cann) else 0


def line(version: str) -> str:
    """What patches have in common: 8.5 of 8.5.2, 7.2 of 7.2.0.1, 8.2.RC1 of 8.2.RC1.alpha002, 6.0.RC2 of 6.0.rc2.1."""
    number, candidate, count = (cann_version(version) or "").partition("RC")
    return f"{number}RC{count.partition('.')[0]}" if candidate else series(version) or ""


@lru_cache(maxsize=None)
def admits(name: str, version: str, python: str) -> bool:
    """Whether a stack runs on a Python; True where its maker says nothing."""
    if name == "mindie_sd":
        return version not in SPANS or cann_order(python) >= cann_order(SPANS[version].python)
    return python in record_of(name, version)["python"].split()
