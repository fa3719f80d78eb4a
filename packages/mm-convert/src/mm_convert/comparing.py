"""Bytes beside bytes, a buffer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mm_convert.copying import CHUNK, matrix, place, read_all
from mm_convert.plans import BYTES, Ref, Segment, Specs
from mm_convert.stored import StoredFile

if TYPE_CHECKING:
    import numpy as np

Files = Mapping[str, StoredFile]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A checkpoint to compare: what its tensors are, and the files that hold them."""

    tensors: Specs
    files: Files


def same_bytes(a_files: Files, a: Ref, b_files: Files, b: Ref) -> bool:
    """Whether two tensors of one size hold the same bytes.

    Raises:
        CheckpointError: a file changed since its header was read.
    """
    with ExitStack() as stack:
        (x, x_start), (y, y_start) = (
            (stack.enter_context(files[ref.file].opened()), files[ref.file].offsets[ref.section, ref.name])
            for files, ref in ((a_files, a), (b_files, b))
        )
        nbytes = a_files[a.file].specs[a.section, a.name].nbytes
        buffers = memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK))
        for start in range(0, nbytes, CHUNK):
            parts = [buffer[: min(CHUNK, nbytes - start)] for buffer in buffers]
            read_all(x, parts[0], x_start + start)
            read_all(y, parts[1], y_start + start)
            if parts[0] != parts[1]:
                return False
    return True


def differing_elements(segment: Segment, a: Side, b: Side) -> int:
    """How many elements of a segment of `a`'s tensor differ from where it belongs in `b`'s.

    Raises:
        CheckpointError: a file changed since its header was read.
    """
    if segment.transposed:
        x, y = (
            place(_whole(a, segment.source), segment, first=True),
            place(_whole(b, segment.target), segment, first=False),
        )
        return int((x != y).sum())
    size = BYTES[a.tensors[segment.source].dtype]
    return sum(
        _unequal(x, y, size) for x, y in zip(_runs(segment, a, first=True), _runs(segment, b, first=False), strict=True)
    )


def segment_bytes(segment: Segment, side: Side) -> int:
    """Bytes of a segment, by the side of its source."""
    shape = side.tensors[segment.source].shape
    others = prod(shape[: segment.source_dim]) * prod(shape[segment.source_dim + 1 :])
    return segment.length * others * BYTES[side.tensors[segment.source].dtype]


def _whole(side: Side, ref: Ref) -> np.ndarray:
    """A matrix that is stored the other way round in the other checkpoint: an expert's, so of bounded size."""
    held = matrix(side.tensors[ref])
    file = side.files[ref.file]
    with file.opened() as descriptor:
        read_all(descriptor, held.data.cast("B"), file.offsets[ref.section, ref.name])
    return held


def _runs(segment: Segment, side: Side, *, first: bool) -> Iterator[memoryview]:
    """The segment's bytes in one of its tensors; both sides give them in parts of the same lengths.

    Where the dimensions before the cut make many short runs, whole rows are read, many at a time.
    """
    ref, start = (segment.source, segment.source_start) if first else (segment.target, segment.target_start)
    shape, dtype = side.tensors[ref].shape, side.tensors[ref].dtype
    below = prod(shape[segment.dim + 1 :]) * BYTES[dtype]
    rows, width = prod(shape[: segment.dim]), shape[segment.dim] * below if shape else BYTES[dtype]
    begin, length = start * below, segment.length * below
    file = side.files[ref.file]
    offset = file.offsets[ref.section, ref.name]
    with file.opened() as descriptor:
        if rows == 1:
            buffer = memoryview(bytearray(min(CHUNK, length)))
            for at in range(0, length, CHUNK):
                part = buffer[: min(CHUNK, length - at)]
                read_all(descriptor, part, offset + begin + at)
                yield part
            return
        step = max(1, CHUNK // max(1, width))
        buffer = memoryview(bytearray(step * width))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            read_all(descriptor, buffer[: count * width], offset + row * width)
            for n in range(count):
                yield buffer[n * width + begin : n * width + begin + length]


def _unequal(x: memoryview, y: memoryview, size: int) -> int:
    if x == y:
        return 0
    import numpy as np

    a, b = (np.frombuffer(part, np.uint8).reshape(-1, size) for part in (x, y))
    return int((a != b).any(axis=1).sum())
