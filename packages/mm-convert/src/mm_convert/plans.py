"""A conversion, decided from headers alone and proved total before a byte is moved.

A plan is a set of segments: ``target[a:a+n] = source[b:b+n]`` along one dimension. Rules produce the
segments for Hugging Face → Megatron; turning every segment round gives the way back, so the two
directions cannot disagree. A plan is accepted only if every byte of every target is written exactly
once and every byte of every source is read. Where several sources claim the same bytes of a target
(copies on tensor-parallel ranks, a tied output layer), the first is written and the others become
checks: they must hold the same bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from mm_convert.errors import TotalityError
from mm_convert.rules import Shape

BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
SHOWN = 8
ZEROS = "zeros"
"""The section of sources that stand in no file: zeros that a target holds and the source does not."""
PADDED = "padding of "
"""What the names of those begin with that one layout has and another has not, or others."""


class Ref(NamedTuple):
    """A tensor's address: file (relative to its checkpoint), section inside it, name."""

    file: str
    section: str
    name: str


@dataclass(frozen=True)
class Spec:
    """What a header says of a tensor: safetensors' dtype name, and shape."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * BYTES[self.dtype]


class Segment(NamedTuple):
    """``target[target_start : target_start + length] = source[source_start : …]`` along `dim` of the target.

    A `transposed` one takes a matrix's columns for its rows: there it runs along the source's other dimension.
    """

    source: Ref
    source_start: int
    target: Ref
    target_start: int
    length: int
    dim: int
    transposed: bool = False

    @property
    def is_padding(self) -> bool:
        """Whether it writes what only its layout holds."""
        return self.source.section == ZEROS and self.source.name.startswith(PADDED)

    @property
    def source_dim(self) -> int:
        """The dimension of the source along which the segment runs."""
        return 1 - self.dim if self.transposed else self.dim

    def reversed(self) -> Segment:
        """The same segment, read the other way."""
        return Segment(
            self.target,
            self.target_start,
            self.source,
            self.source_start,
            self.length,
            self.source_dim,
            self.transposed,
        )


Specs = Mapping[Ref, Spec]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A total conversion.

    Attributes:
        sources: every tensor read.
        targets: every tensor made.
        writes: the segments of each target, in order; together they tile it.
        checks: segments whose bytes must equal what stands in the target already.
        dropped: segments of sources that have no place in the targets: what once was made out of nothing.
    """

    sources: Specs
    targets: Specs
    writes: Mapping[Ref, tuple[Segment, ...]]
    checks: Mapping[Ref, tuple[Segment, ...]]
    dropped: tuple[Segment, ...] = ()

    @classmethod
    def build(cls, sources: Specs, targets: Specs, segments: Iterable[Segment]) -> Plan:
        """Order the segments and prove the plan total.

        Raises:
            TotalityError: bytes of a source unused, or of a target unwritten or written twice.
        """
        writes: dict[Ref, tuple[Segment, ...]] = {}
        checks: dict[Ref, tuple[Segment, ...]] = {}
        by_target = _group(segments, "target")
        dropped = [s for ref in [ref for ref in by_target if ref.section == ZEROS] for s in by_target.pop(ref)]
        for target, spec in targets.items():
            first: dict[int, Segment] = {}
            again = [s for s in by_target.pop(target, []) if first.setdefault(s.target_start, s) is not s]
            writes[target] = tuple(first[start] for start in sorted(first))
            _prove_tiled(target, spec, [(s.target_start, s.length, s.dim) for s in writes[target]])
            for segment in again:
                if segment.length != first[segment.target_start].length:
                    raise TotalityError(f"two rules cut {target.name} differently")
            if again:
                checks[target] = tuple(again)
        if by_target:
            raise TotalityError(f"segments write tensors that are no target: {listed([ref.name for ref in by_target])}")
        _prove_used(sources, [*dropped, *(s for part in (writes, checks) for ss in part.values() for s in ss)])
        return cls(sources=sources, targets=targets, writes=writes, checks=checks, dropped=tuple(dropped))

    def files(self) -> dict[str, list[Ref]]:
        """The targets of each file to write, in order."""
        files: dict[str, list[Ref]] = {}
        for ref in self.targets:
            files.setdefault(ref.file, []).append(ref)
        return files

    def segments(self) -> Iterator[Segment]:
        """Writes, checks and what is dropped."""
        for part in (self.writes, self.checks):
            for segments in part.values():
                yield from segments
        yield from self.dropped

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(spec.nbytes for spec in self.targets.values())


def _group(segments: Iterable[Segment], by: str) -> dict[Ref, list[Segment]]:
    groups: dict[Ref, list[Segment]] = defaultdict(list)
    for segment in segments:
        groups[getattr(segment, by)].append(segment)
    return groups


def _prove_tiled(ref: Ref, spec: Spec, pieces: list[tuple[int, int, int]]) -> None:
    position = 0
    for start, length, _ in pieces:
        if start != position:
            raise TotalityError(
                f"{ref.name}: rows {min(start, position)} to {max(start, position)} are not made exactly once"
            )
        position += length
    dims = {dim for *_, dim in pieces}
    if len(dims) != 1 or position != spec.shape[dims.pop()]:
        raise TotalityError(f"{ref.name} of shape {list(spec.shape)} is not made whole")


def _prove_used(sources: Specs, segments: list[Segment]) -> None:
    by_source = _group(segments, "source")
    for ref, spec in sources.items():
        for dim in {s.source_dim for s in by_source[ref]} or {0}:
            position = 0
            for start, length in sorted((s.source_start, s.length) for s in by_source[ref] if s.source_dim == dim):
                if start > position:
                    break
                position = max(position, start + length)
            if position != spec.shape[dim]:
                raise TotalityError(
                    f"{ref.name} of shape {list(spec.shape)}: only {position} of {spec.shape[dim]} are used"
                )


def listed(items: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(items[:SHOWN]) + (f", and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
