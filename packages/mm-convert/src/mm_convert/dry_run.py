"""What a conversion would read, write and need, from its plan: nothing is touched."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.comparing import Side, segment_bytes
from mm_convert.convert import Conversion
from mm_convert.copying import CHUNK, Job, jobs
from mm_convert.execute import default_workers
from mm_convert.plan import Plan

INTERPRETER = 40 << 20
"""Memory of the process without buffers, in bytes: Python, headers and the plan of a model of some thousand tensors."""


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A file that would be made: its tensors, and its size in bytes."""

    tensors: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a conversion would do.

    Attributes:
        source: what is read, in words.
        target: the folder that would be made.
        target_exists: whether something stands there, so that ``--overwrite`` is needed.
        options: the command and the layout.
        reads: bytes of each file that is read.
        source_tensors: tensors that are read, every byte of each at least once.
        read_bytes: bytes to read, comparisons included.
        writes: the files that would be made, by their names in the folder.
        tensors: how many tensors are copied whole, cut out of one, or joined from several pieces.
        compared: ranges that several copies claim: one is written, the others must hold the same bytes.
        disk_bytes: bytes of all files that would be made.
        disk_free: bytes free where they would go; None where the file system does not say.
        memory_bytes: an upper bound for the process.
        workers: threads that the bound is for.
    """

    source: str
    target: str
    target_exists: bool
    options: Mapping[str, Any]
    reads: Mapping[str, int]
    source_tensors: int
    read_bytes: int
    writes: Mapping[str, WrittenFile]
    tensors: Mapping[str, int]
    compared: int
    disk_bytes: int
    disk_free: int | None
    memory_bytes: int
    workers: int


def forecast(conversion: Conversion, *, workers: int | None = None) -> Forecast:
    """Say what a planned conversion would do; that it was planned means that it was proved total.

    Args:
        conversion: from :meth:`mm_convert.Converter.prepare_hf_to_mm` and its siblings.
        workers: threads that would copy (default: the processors, at most 4).
    """
    plan, target = conversion.plan, conversion.target
    workers = workers or default_workers()
    todo = jobs(plan, conversion.files)
    held = plan.files()
    writes = {
        target.name(file): WrittenFile(tensors=len(held.get(file, ())), nbytes=layout.size)
        for file, layout in target.layouts.items()
    }
    return Forecast(
        source=conversion.source,
        target=str(target.directory),
        target_exists=target.directory.exists(),
        options=dict(target.options),
        reads={file: stored.size for file, stored in conversion.files.items()},
        source_tensors=len(plan.sources),
        read_bytes=_read_bytes(plan, todo),
        writes=writes,
        tensors=_kinds(plan),
        compared=sum(map(len, plan.checks.values())),
        disk_bytes=sum(file.nbytes for file in writes.values()),
        disk_free=_free(target.directory),
        memory_bytes=INTERPRETER + sum(sorted((_buffers(plan, job) for job in todo), reverse=True)[:workers]),
        workers=workers,
    )


def _kinds(plan: Plan) -> dict[str, int]:
    kinds = {"copied": 0, "cut": 0, "joined": 0}
    for ref, segments in plan.writes.items():
        whole = len(segments) == 1 and plan.targets[ref].nbytes == plan.sources[segments[0].source].nbytes
        kinds["copied" if whole else "cut" if len(segments) == 1 else "joined"] += 1
    return kinds


def _rows(plan: Plan, job: Job) -> int:
    return prod(plan.targets[job[0]].shape[: plan.writes[job[0]][0].dim])


def _read_bytes(plan: Plan, todo: list[Job]) -> int:
    total = 0
    for job in todo:
        if _rows(plan, job) > 1:
            total += sum(plan.sources[ref].nbytes for ref in {s.source for t in job for s in plan.writes[t]})
        else:
            total += sum(plan.targets[ref].nbytes for ref in job)
    # A comparison reads the other copy, and again what was written.
    side = Side(tensors=plan.sources, files={})
    return total + 2 * sum(segment_bytes(s, side) for checks in plan.checks.values() for s in checks)


def _buffers(plan: Plan, job: Job) -> int:
    """Bytes that a worker holds at once for a job."""
    rows = _rows(plan, job)
    if rows <= 1:
        return 2 * CHUNK
    sources = {s.source for t in job for s in plan.writes[t]}
    widths = [plan.sources[ref].nbytes // rows for ref in sources] + [plan.targets[ref].nbytes // rows for ref in job]
    return sum(widths) * min(rows, max(1, CHUNK // max(1, *widths)))


def _free(folder: Path) -> int | None:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    usage = shutil.disk_usage(there)
    # Some network file systems don't know, and say that they have nothing at all.
    return usage.free if usage.total else None
