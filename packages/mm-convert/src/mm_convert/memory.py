"""How much memory copying takes: a job's buffers, and those of all workers together.

Execution and dry run both ask here, so that they cannot disagree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from heapq import nlargest
from math import prod

from mm_convert import copying
from mm_convert.dealing import dealt_bytes
from mm_convert.errors import RamCapError
from mm_convert.plans import ZEROS, Plan

UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMG]I?B)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """What so many workers hold: never more than `nbytes` together."""

    workers: int
    nbytes: int


def buffer_bytes(plan: Plan, job: copying.Job) -> int:
    """An upper bound of the bytes that a worker holds at once for a job."""
    segments = [s for target in job for s in plan.writes[target]]
    streamed = 2 * copying.CHUNK
    if is_turned(plan, job):
        sources = [plan.sources[ref].nbytes for ref in {s.source for s in segments if s.source.section != ZEROS}]
        return sum(sources) + 2 * max(plan.targets[ref].nbytes for ref in job)
    count = rows(plan, job)
    if count <= 1:
        return streamed
    dealt = dealt_bytes(plan, job, count, copying.CHUNK)
    return max(dealt, streamed) if any(plan.checks.get(target) for target in job) else dealt


def is_turned(plan: Plan, job: copying.Job) -> bool:
    """Whether a job's matrices are transposed, for which they are held whole."""
    return plan.writes[job[0]][0].transposed


def rows(plan: Plan, job: copying.Job) -> int:
    """How many rows the dimensions before the cut make of a tensor; where more than one, they are dealt out."""
    return prod(plan.targets[job[0]].shape[: plan.writes[job[0]][0].dim])


def buffers(
    plan: Plan, todo: Iterable[copying.Job], *, workers: int | None = None, ram_cap: int | None = None
) -> Buffers:
    """How many workers there will be, and what they hold at most.

    Args:
        plan: the plan.
        todo: its jobs.
        workers: threads that are wanted (default: :func:`default_workers`).
        ram_cap: bytes that their buffers may take together; it lowers the number of workers.

    Raises:
        RamCapError: one worker alone may need more than `ram_cap`.
    """
    wanted = workers or default_workers()
    largest = nlargest(wanted, (buffer_bytes(plan, job) for job in todo))
    while ram_cap is not None and sum(largest[:wanted]) > ram_cap:
        if wanted == 1:
            raise RamCapError(
                f"--ram-cap {ram_cap}: too small, the buffers of a single worker take up to {largest[0]:,} bytes; the"
                f" least is --ram-cap {largest[0]}"
            )
        wanted -= 1
    return Buffers(workers=wanted, nbytes=sum(largest[:wanted]))


def default_workers() -> int:
    """Processors that this process may use, at most 4: beyond that disks, not processors, are the limit."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, usable or 1)


def parse_size(text: str | int) -> int:
    """Bytes out of ``512MiB``, ``1.5 GB`` or a plain number.

    Raises:
        ValueError: no size, or none above 0.
    """
    found = SIZE.fullmatch(str(text).strip())
    size = int(Decimal(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise ValueError(
            f"{text!r} is no size; write a number of bytes, or one with KiB, MiB, GiB, KB, MB or GB behind it: 512MiB"
        )
    return size
