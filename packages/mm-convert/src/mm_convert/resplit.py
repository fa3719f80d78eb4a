"""Megatron to Megatron in another layout, as one plan without a copy in between.

Both layouts are related to the same Hugging Face tensors, which exist on paper only, and the two relations are joined:
what the one takes out of a range of such a tensor, the other puts there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence

from mm_convert.errors import CheckpointError, LayoutError
from mm_convert.families import Family
from mm_convert.families.family import ModelSizes
from mm_convert.layout import RANK_FILE, Layout
from mm_convert.megatron import MegatronFolder
from mm_convert.plan import Plan, Ref, Segment, Spec, Specs, listed
from mm_convert.relate import check_same, places, relate
from mm_convert.rules import Operation, Rule, Shape


def plan_resplit(family: Family, sizes: ModelSizes, mm: MegatronFolder, target: Layout) -> Plan:
    """Plan Megatron → Megatron.

    Args:
        family: the model family.
        sizes: the model's numbers.
        mm: the checkpoint to read.
        target: the layout to write.

    Raises:
        ConvertError: the checkpoint is not whole, or the target's layout does not fit the model.
    """
    sizes.check(target)
    between = paper_tensors(family, sizes, mm)
    held, there = relate(family, sizes, mm.layout, between)
    check_same(mm.tensors, held, str(mm.directory))
    _check_dtypes(mm, held)
    targets, onwards = relate(family, sizes, target, between)
    return Plan.build(mm.tensors, targets, compose(there, onwards))


def paper_tensors(family: Family, sizes: ModelSizes, mm: MegatronFolder) -> dict[Ref, Spec]:
    """Hugging Face tensors that would make this checkpoint.

    Where several are fused, how long each of them is does not matter to a relation that is undone again: the shapes are
    right together, not one by one.

    Raises:
        CheckpointError: a tensor is missing, or of a shape that no tensor makes.
    """
    made: dict[Ref, Spec] = {}
    explained: set[Ref] = set()
    missing: list[str] = []
    rules = family.rules(sizes, mm.layout.pp_size)
    for rule in sorted(rules, key=lambda rule: rule.optional):
        for stage, i, j in places(rule, mm.layout):
            ref = Ref(_file(mm.layout, stage), mm.layout.section(stage), rule.mm.format(j=j))
            if ref in explained and rule.optional:
                continue
            if ref not in mm.tensors:
                missing += [] if rule.optional else [f"{ref.file}: {ref.name}"]
                continue
            explained.add(ref)
            spec = mm.tensors[ref]
            shapes = _source_shapes(rule, spec.shape, mm.layout.tp_size, max(1, sizes.key_value_heads))
            for name, shape in zip(rule.hf, shapes, strict=True):
                made.setdefault(Ref("", "", name.format(i=i)), Spec(spec.dtype, shape))
    if missing:
        raise CheckpointError(f"{mm.directory} lacks {len(missing)} tensors: {listed(missing)}; nothing was written")
    return made


def compose(first: Iterable[Segment], second: Iterable[Segment]) -> list[Segment]:
    """Join two relations that begin at the same tensors: segments from the targets of `first` to those of `second`.

    Where several targets of `first` hold the same range, the first reader of the range gets all of them, so that they
    are compared once; further readers get one.
    """
    holders: dict[tuple[Ref, int], dict[int, list[Segment]]] = defaultdict(lambda: defaultdict(list))
    for segment in first:
        holders[segment.source, segment.dim][segment.source_start].append(segment)
    starts = {key: sorted(ranges) for key, ranges in holders.items()}
    compared: set[tuple[Ref, int, int]] = set()
    # One chain for each target and each of the claims to it; neighbours in a chain are often one range.
    chains: dict[tuple[int, Ref], list[Segment]] = defaultdict(list)
    for wanted in second:
        key, position = (wanted.source, wanted.dim), wanted.source_start
        stop = position + wanted.length
        while position < stop:
            begin = starts[key][bisect_right(starts[key], position) - 1]
            claims = holders[key][begin]
            end = min(stop, begin + claims[0].length)
            mark = (wanted.source, wanted.dim, position)
            for number, claim in enumerate(claims[:1] if mark in compared else claims):
                part = Segment(
                    source=claim.target,
                    source_start=claim.target_start + position - begin,
                    target=wanted.target,
                    target_start=wanted.target_start + position - wanted.source_start,
                    length=end - position,
                    dim=wanted.dim,
                )
                _append(chains[number, wanted.target], part)
            compared.add(mark)
            position = end
    return [segment for _, chain in sorted(chains.items(), key=lambda item: item[0][0]) for segment in chain]


def _append(chain: list[Segment], part: Segment) -> None:
    """Add a segment to those of one target, as a longer one where it goes on from the last."""
    last = chain[-1] if chain else None
    if (
        last is not None
        and (last.source, last.dim) == (part.source, part.dim)
        and last.source_start + last.length == part.source_start
        and last.target_start + last.length == part.target_start
    ):
        chain[-1] = last._replace(length=last.length + part.length)
    else:
        chain.append(part)


def _source_shapes(rule: Rule, shape: Shape, tp_size: int, unit: int) -> list[Shape]:
    """Shapes of a rule's sources that give tensor-parallel rank 0 a tensor of this shape."""
    operation, count = rule.operation, len(rule.hf)
    for total in dict.fromkeys((shape[operation.dim : operation.dim + 1] or (0,))[0] * n for n in (1, tp_size)):
        equal = [total // count] * count
        uneven = [total - (count - 1) * unit, *[unit] * (count - 1)]
        for lengths in (equal, uneven):
            shapes = [(*shape[: operation.dim], n, *shape[operation.dim + 1 :]) for n in lengths]
            if sum(lengths) == total and _makes(operation, shapes, tp_size, shape):
                return shapes
    raise CheckpointError(
        f"{rule.mm} has shape {list(shape)} on each of {tp_size} tensor-parallel ranks, which no tensors"
        f" {', '.join(rule.hf)} give; is it a checkpoint of this model?"
    )


def _makes(operation: Operation, shapes: Sequence[Shape], tp_size: int, shape: Shape) -> bool:
    try:
        ranks = operation.pieces(shapes, tp_size)
    except LayoutError:
        return False
    lengths = {sum(piece.stop - piece.start for piece in pieces) for pieces in ranks}
    return len(shape) > operation.dim and lengths == {shape[operation.dim]}


def _file(layout: Layout, stage: int) -> str:
    return f"{layout.rank_dir(0, layout.place(stage)[0])}/{RANK_FILE}"


def _check_dtypes(mm: MegatronFolder, held: Specs) -> None:
    wrong = [
        f"{ref.file}: {ref.name} is {mm.tensors[ref].dtype}, elsewhere {spec.dtype}"
        for ref, spec in held.items()
        if mm.tensors[ref].dtype != spec.dtype
    ]
    if wrong:
        raise CheckpointError(f"{mm.directory} holds a tensor in different dtypes on its ranks: {listed(wrong)}")
