"""Make target tensors out of byte ranges of the sources, a buffer at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from zlib_ng.zlib_ng import crc32

from mm_convert.dealing import MOST_PARTS, readings, rows_at_once, runs
from mm_convert.errors import CheckpointError, unequal
from mm_convert.plans import BYTES, ZEROS, Plan, Ref, Segment, Spec
from mm_convert.stored import Descriptor, StoredFile

if TYPE_CHECKING:
    import numpy as np

# What a worker holds of a file at a time: small enough to stay in the processor's cache between reading, CRC and
# writing (4 MiB took nearly twice the processor time), large enough that calls cost nothing.
CHUNK = 1 << 20
BIG = 256 << 20

Job = tuple[Ref, ...]
"""Targets that are made together, because they are cut out of the same rows."""


class Stopped(Exception):
    """Another worker failed, or the user interrupted: this one's work is no longer wanted."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """A file that is being written: where it is, and where its tensors go."""

    path: Path
    offsets: Mapping[Ref, int]


def jobs(plan: Plan, sources: Mapping[str, StoredFile]) -> list[Job]:
    """All targets; those cut from the same rows together, so that the rows are read once.

    Big ones come first, so that no worker is left alone with one at the end, the others in the order in which their
    sources stand.
    """
    groups: dict[object, list[Ref]] = {}
    for target, segments in plan.writes.items():
        together = _rows(plan, target) > 1 or segments[0].transposed
        shared = tuple(sorted({s.source for s in segments})) if together else target
        groups.setdefault((segments[0].dim, shared), []).append(target)

    def place(job: Job) -> tuple[bool, str, int]:
        first = next((s.source for s in plan.writes[job[0]] if s.source.section != ZEROS), None)
        offset = sources[first.file].offsets[first.section, first.name] if first else 0
        return sum(plan.targets[ref].nbytes for ref in job) < BIG, first.file if first else "", offset

    return sorted(map(tuple, groups.values()), key=place)


@dataclass(frozen=True, kw_only=True)
class Copier:
    """Carries out jobs; many threads may share one.

    Args:
        plan: the plan.
        sources: the files to read, by their names in the plan.
        outputs: the files to write, laid out, by their names in the plan.
        advance: told how many bytes were written, again and again.
        stop: when set, work ends with :class:`Stopped`.
    """

    plan: Plan
    sources: Mapping[str, StoredFile]
    outputs: Mapping[str, Output]
    advance: Callable[[int], object]
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, job: Job) -> dict[Ref, int]:
        """Write the tensors of a job.

        Returns:
            CRC-32 of each.

        Raises:
            CheckpointError: a source changed, or two sources of the same bytes differ.
            OSError: reading or writing failed.
        """
        with ExitStack() as stack:
            files = _Files(self, stack)
            if self.plan.writes[job[0]][0].transposed:
                crcs = self._transpose(job, files)
            elif _rows(self.plan, job[0]) > 1:
                crcs = self._interleave(job, files)
            else:
                crcs = {target: self._concatenate(target, files) for target in job}
            for target in job:
                for segment in self.plan.checks.get(target, ()):
                    self._compare(segment, files)
            return crcs

    def crc(self, target: Ref) -> int:
        """CRC-32 of what stands in a target's place."""
        crc = 0
        with ExitStack() as stack:
            descriptor, offset = _Files(self, stack).target(target)
            for part in self._read(descriptor, offset, self.plan.targets[target].nbytes):
                crc = crc32(part, crc)
        return crc

    def _concatenate(self, target: Ref, files: _Files) -> int:
        out, position = files.target(target)
        crc = 0
        for segment in self.plan.writes[target]:
            for part in self._parts(segment, files):
                crc = crc32(part, crc)
                write_all(out, part, position)
                position += len(part)
                self.advance(len(part))
        return crc

    def _parts(self, segment: Segment, files: _Files) -> Iterator[bytes | memoryview]:
        if segment.source.section == ZEROS:
            spec = self.plan.targets[segment.target]
            length = segment.length * spec.nbytes // spec.shape[segment.dim]
            zeros = memoryview(bytes(min(CHUNK, length)))
            for start in range(0, length, CHUNK):
                yield zeros[: length - start]
            return
        descriptor, offset = files.source(segment.source)
        for start, _, length in runs(self.plan, segment):
            yield from self._read(descriptor, offset + start, length)

    def _transpose(self, job: Job, files: _Files) -> dict[Ref, int]:
        """Matrices whose rows are the sources' columns: each is held whole, an expert's at most."""
        held: dict[Ref, np.ndarray] = {}
        for source in {s.source for target in job for s in self.plan.writes[target]}:
            descriptor, offset = files.source(source)
            held[source] = matrix(self.plan.sources[source])
            self._fill(descriptor, held[source].data.cast("B"), offset)
        crcs = {}
        for target in job:
            made = matrix(self.plan.targets[target])
            for segment in self.plan.writes[target]:
                place(made, segment, first=False)[:] = place(held[segment.source], segment, first=True)
            descriptor, offset = files.target(target)
            data = made.data.cast("B")
            crcs[target] = crc32(data)
            write_all(descriptor, data, offset)
            self.advance(len(data))
        return crcs

    def _interleave(self, job: Job, files: _Files) -> dict[Ref, int]:
        """Tensors cut along a later dimension: some rows of every source at a time, dealt out to the targets."""
        rows = _rows(self.plan, job[0])
        widths = {target: self.plan.targets[target].nbytes // rows for target in job}
        ways = readings(self.plan, job, rows)
        step = rows_at_once(rows, widths.values(), ways, CHUNK)
        made = {target: memoryview(bytearray(step * width)) for target, width in widths.items()}
        skipped = memoryview(bytearray(max((way.gap for way in ways), default=0)))
        # Where each part of a row goes is the same for every step.
        parts = [(way, way.parts(made, widths, skipped, step)) for way in ways]
        crcs = dict.fromkeys(job, 0)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            for way, places in parts:
                descriptor, offset = files.source(way.source)
                self._check_wanted()
                read_scattered(descriptor, places[: count * len(way.spans)], offset + row * way.width)
            for ref, width in widths.items():
                descriptor, offset = files.target(ref)
                part = made[ref][: count * width]
                crcs[ref] = crc32(part, crcs[ref])
                write_all(descriptor, part, offset + row * width)
                self.advance(len(part))
        return crcs

    def _compare(self, segment: Segment, files: _Files) -> None:
        if segment.transposed:
            raise AssertionError("matrices that are stored the other way round have no copies on other ranks")
        descriptor, offset = files.source(segment.source)
        made, place = files.target(segment.target)
        for start, target_start, length in runs(self.plan, segment):
            again = self._read(descriptor, offset + start, length)
            written = self._read(made, place + target_start, length)
            if any(a != b for a, b in zip(again, written, strict=True)):
                first = self.plan.writes[segment.target][0].source
                raise CheckpointError(unequal(segment.source, first, segment.target))

    def _read(self, descriptor: int, offset: int, length: int) -> Iterator[memoryview]:
        """A range in parts, each valid until the next is asked for."""
        buffer = memoryview(bytearray(min(CHUNK, length)))
        for start in range(0, length, CHUNK):
            part = buffer[: min(CHUNK, length - start)]
            self._fill(descriptor, part, offset + start)
            yield part

    def _fill(self, descriptor: int, part: memoryview, offset: int) -> None:
        self._check_wanted()
        read_all(descriptor, part, offset)

    def _check_wanted(self) -> None:
        if self.stop.is_set():
            raise Stopped


class _Files:
    """The files of one job, opened when first needed."""

    def __init__(self, copier: Copier, stack: ExitStack) -> None:
        self.copier, self.stack = copier, stack
        self.descriptors: dict[tuple[str, str], int] = {}

    def source(self, ref: Ref) -> tuple[int, int]:
        """Descriptor, and the tensor's first byte."""
        file = self.copier.sources[ref.file]
        if ("source", ref.file) not in self.descriptors:
            self.descriptors["source", ref.file] = self.stack.enter_context(file.opened())
        return self.descriptors["source", ref.file], file.offsets[ref.section, ref.name]

    def target(self, ref: Ref) -> tuple[int, int]:
        """Descriptor, and the place of the tensor's first byte."""
        output = self.copier.outputs[ref.file]
        if ("target", ref.file) not in self.descriptors:
            descriptor = Descriptor.of(output.path, os.O_RDWR)
            self.stack.callback(os.close, descriptor)
            self.descriptors["target", ref.file] = descriptor
        return self.descriptors["target", ref.file], output.offsets[ref]


def read_all(descriptor: int, part: memoryview, offset: int) -> None:
    """Fill `part` from a file.

    Raises:
        CheckpointError: the file ends before, or can't be read.
    """
    read_scattered(descriptor, [part], offset)


def read_scattered(descriptor: int, parts: Sequence[memoryview], offset: int) -> None:
    """Fill several places, one after another, from a file.

    Raises:
        CheckpointError: the file ends before, or can't be read.
    """
    first, within = 0, 0
    while first < len(parts):
        asked = [parts[first][within:], *parts[first + 1 : first + MOST_PARTS]]
        try:
            count = os.preadv(descriptor, asked, offset)
        except OSError as error:
            raise CheckpointError(
                f"{_name(descriptor)} can't be read: {error.strerror}; is its disk all right?"
            ) from error
        if not count and any(asked):
            raise CheckpointError(
                f"{_name(descriptor)} ends at byte {offset}, where more was planned: was it truncated?"
            )
        offset += count
        for part in asked:
            if count < len(part):
                within = (within if part is asked[0] else 0) + count
                break
            count -= len(part)
            first, within = first + 1, 0


def _name(descriptor: int) -> object:
    return descriptor.path if isinstance(descriptor, Descriptor) else "a source"


def write_all(descriptor: int, part: bytes | memoryview, offset: int) -> None:
    """Write `part` into a file at `offset`."""
    done = 0
    while done < len(part):
        done += os.pwrite(descriptor, part[done:], offset + done)


def matrix(spec: Spec) -> np.ndarray:
    """Room for a tensor's elements, as unsigned numbers of their size: bytes are moved, never values."""
    import numpy as np

    return np.empty(spec.shape, np.dtype(f"u{BYTES[spec.dtype]}"))


def place(tensor: np.ndarray, segment: Segment, *, first: bool) -> np.ndarray:
    """A segment's part of its source (`first`), turned as the target has it, or of its target."""
    start, dim = (segment.source_start, segment.source_dim) if first else (segment.target_start, segment.dim)
    index: list[slice] = [slice(None)] * tensor.ndim
    index[dim] = slice(start, start + segment.length)
    part = tensor[tuple(index)]
    return part.T if first and segment.transposed else part


def _rows(plan: Plan, target: Ref) -> int:
    """How many separate runs the dimensions before the cut make of each segment; 1 means contiguous."""
    spec: Spec = plan.targets[target]
    return prod(spec.shape[: plan.writes[target][0].dim])
