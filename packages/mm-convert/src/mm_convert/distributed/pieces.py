"""Plans over tensors that are stored in pieces, or under other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_convert.errors import CheckpointError
from mm_convert.plans import Plan, Ref, Segment, Spec, Specs
from mm_convert.rules import Shape


@dataclass(frozen=True)
class Piece:
    """A stored part of a tensor.

    Attributes:
        ref: its address.
        offsets: where it begins in the tensor.
        sizes: its shape.
        place: where it stands, in the words of whoever stores it.
    """

    ref: Ref
    offsets: Shape
    sizes: Shape
    place: Any = None


def with_targets(plan: Plan, stored: Mapping[Ref, Ref]) -> Plan:
    """The same plan, whose targets have other addresses."""
    targets = {stored[ref]: spec for ref, spec in plan.targets.items()}
    moved = [s._replace(target=stored.get(s.target, s.target)) for s in plan.segments()]
    return Plan.build(plan.sources, targets, moved)


def with_sources(plan: Plan, pieces: Mapping[Ref, Sequence[Piece]]) -> Plan:
    """The same plan, whose sources are read piece by piece.

    Args:
        plan: a plan that reads whole tensors.
        pieces: the stored pieces of each.

    Raises:
        CheckpointError: pieces that no plan can read: cut along two dimensions at once.
    """
    sources = {ref: spec for ref, spec in plan.sources.items() if ref not in pieces}
    for ref, held in pieces.items():
        sources |= {piece.ref: Spec(plan.sources[ref].dtype, piece.sizes) for piece in held}
    segments = [
        part
        for segment in plan.segments()
        for part in ([segment] if segment.source not in pieces else _cut(segment, plan, pieces[segment.source]))
    ]
    return Plan.build(sources, plan.targets, segments)


def _cut(segment: Segment, plan: Plan, pieces: Sequence[Piece]) -> Iterator[Segment]:
    whole = plan.sources[segment.source].shape
    if len(pieces) == 1:
        yield segment._replace(source=pieces[0].ref)
        return
    dim = _cut_dim(segment.source, whole, pieces)
    if dim != segment.source_dim:
        segment = _turned(segment, plan, dim)
    start, stop = segment.source_start, segment.source_start + segment.length
    for piece in pieces:
        begin = max(start, piece.offsets[dim])
        end = min(stop, piece.offsets[dim] + piece.sizes[dim])
        if begin < end:
            yield segment._replace(
                source=piece.ref,
                source_start=begin - piece.offsets[dim],
                target_start=segment.target_start + begin - start,
                length=end - begin,
            )


def _cut_dim(ref: Ref, whole: Shape, pieces: Sequence[Piece]) -> int:
    """The one dimension along which a tensor is cut."""
    dims = {d for piece in pieces for d, size in enumerate(piece.sizes) if size != whole[d]}
    if len(dims) != 1:
        raise CheckpointError(
            f"{ref.name} of shape {list(whole)} is stored in pieces {[list(p.sizes) for p in pieces[:4]]}, cut along"
            " several dimensions at once; save the checkpoint with one kind of sharding"
        )
    dim = dims.pop()
    position = 0
    for piece in sorted(pieces, key=lambda piece: piece.offsets[dim]):
        if piece.offsets[dim] != position:
            raise CheckpointError(f"{ref.name}: rows {position} to {piece.offsets[dim]} are not stored exactly once")
        position += piece.sizes[dim]
    return dim


def _turned(segment: Segment, plan: Plan, dim: int) -> Segment:
    """A segment that takes a whole tensor for a whole tensor can run along any dimension."""
    source, target = plan.sources[segment.source].shape, plan.targets[segment.target].shape
    is_whole = source == target and segment.length == target[segment.dim] and not segment.transposed
    if not is_whole:
        raise CheckpointError(
            f"{segment.source.name} is stored cut along dimension {dim}, but {segment.target.name} needs it along"
            f" dimension {segment.source_dim}; save the checkpoint with one kind of sharding"
        )
    return segment._replace(dim=dim, length=target[dim])


def whole(sources: Specs) -> dict[Ref, Spec]:
    """Specs without a dimension get one, because segments run along one: the bytes are the same."""
    return {ref: spec if spec.shape else Spec(spec.dtype, (1,)) for ref, spec in sources.items()}
