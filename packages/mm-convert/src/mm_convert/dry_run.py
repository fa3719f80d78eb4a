"""What a conversion would read, write and need, from its plan: nothing is touched."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_convert.comparing import Side, segment_bytes
from mm_convert.convert import Conversion
from mm_convert.copying import Job, jobs
from mm_convert.dealing import readings
from mm_convert.memory import buffers, is_turned, rows
from mm_convert.plans import ZEROS, Plan

INTERPRETER = 34 << 20
"""Memory of the process without a plan and without buffers, in bytes; measured, like the next two, with some room."""
PER_TENSOR, PER_SEGMENT = 3 << 10, 256
"""What the plan, the work that waits, the journal and the manifest take for each tensor to make, and for each piece."""
NUMPY = 16 << 20
"""What numpy takes beside, which only matrices to transpose need."""


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
        memory_bytes: an upper bound for the process, its buffers and what it holds beside them.
        workers: threads that the bound is for: as many as `ram_cap` allows.
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


def forecast(conversion: Conversion, *, workers: int | None = None, ram_cap: int | None = None) -> Forecast:
    """Say what a planned conversion would do; that it was planned means that it was proved total.

    Args:
        conversion: from :meth:`mm_convert.Converter.prepare_hf_to_mm` and its siblings.
        workers: threads that would copy (default: the processors, at most 4).
        ram_cap: bytes that their buffers may take together.

    Raises:
        RamCapError: one worker needs more than `ram_cap`.
    """
    plan, target = conversion.plan, conversion.target
    todo = jobs(plan, conversion.files)
    at_once = buffers(plan, todo, workers=workers, ram_cap=ram_cap)
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
        memory_bytes=_beside(plan, todo) + at_once.nbytes,
        workers=at_once.workers,
    )


def _beside(plan: Plan, todo: list[Job]) -> int:
    """Bytes that the process holds beside its buffers."""
    segments = sum(map(len, (*plan.writes.values(), *plan.checks.values())))
    numpy = NUMPY * any(is_turned(plan, job) for job in todo)
    return INTERPRETER + numpy + PER_TENSOR * len(plan.targets) + PER_SEGMENT * segments


def _kinds(plan: Plan) -> dict[str, int]:
    kinds = {"copied": 0, "cut": 0, "joined": 0}
    for ref, segments in plan.writes.items():
        source = plan.sources.get(segments[0].source)
        whole = len(segments) == 1 and (source is None or plan.targets[ref].nbytes == source.nbytes)
        kinds["copied" if whole else "cut" if len(segments) == 1 else "joined"] += 1
    return kinds


def _read_bytes(plan: Plan, todo: list[Job]) -> int:
    total = 0
    side = Side(tensors=plan.sources, files={})
    for job in todo:
        segments = [s for target in job for s in plan.writes[target] if s.source.section != ZEROS]
        if is_turned(plan, job):
            total += sum(plan.sources[ref].nbytes for ref in {s.source for s in segments})
        elif (count := rows(plan, job)) > 1:
            total += count * sum(way.width for way in readings(plan, job, count))
        else:
            total += sum(segment_bytes(s, side) for s in segments)
    # A comparison reads the other copy, and again what was written.
    return total + 2 * sum(segment_bytes(s, side) for checks in plan.checks.values() for s in checks)


def _free(folder: Path) -> int | None:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    usage = shutil.disk_usage(there)
    # Some network file systems don't know, and say that they have nothing at all.
    return usage.free if usage.total else None
