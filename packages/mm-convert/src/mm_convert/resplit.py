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
from mm_convert.plans import Plan, Ref, Segment, Spec, Specs, listed
from mm_convert.relate import Instance, check_same, instances, relate
from mm_convert.rules import ZERO, Operation, Rule, Shape, Transposed
from mm_convert.vocabulary import laid_out, settled, without_padding


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
    vocabulary = tokens(sizes, mm)
    if target.make_vocab_size_divisible_by and not vocabulary:
        raise LayoutError(
            f"make_vocab_size_divisible_by: how many rows of {mm.directory} are tokens, and how many were padded, can't"
            " be told from the tensors; name a folder with the model's config.json: --cfg.hf_config.hf_dir"
        )
    layout = settled(mm.layout, mm.tensors, vocabulary, mm.directory)
    between = paper_tensors(family, sizes, mm)
    if vocabulary:
        between = without_padding(family.rules(sizes, mm.layout.pp_size), between, vocabulary)
    held, there = relate(family, sizes, layout, between)
    check_same(mm.tensors, held, str(mm.directory))
    check_dtypes(mm, held)
    targets, onwards = relate(family, sizes, target, between)
    return Plan.build(mm.tensors, targets, compose(there, onwards))


def tokens(sizes: ModelSizes, mm: MegatronFolder) -> int:
    """Tokens of the model, by its configuration or the manifest of the folder; 0 if neither tells."""
    return sizes.vocabulary or mm.vocabulary


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
    rules = laid_out(family.rules(sizes, mm.layout.pp_size), mm.layout)
    for rule in sorted(rules, key=lambda rule: rule.optional):
        for instance in instances(rule, sizes, mm.layout):
            refs = _on_each_rank(mm.layout, instance, mm.layout.tp(rule.part))
            first = mm.tensors.get(refs[0])
            if rule.optional and refs[0] in explained:
                continue
            if first is None:
                missing += [] if rule.optional else [f"{refs[0].file}: {refs[0].name}"]
                continue
            explained.add(refs[0])
            # A rank that lacks the tensor, or holds another shape, is named when all ranks are compared.
            held = [mm.tensors.get(ref, first).shape for ref in refs]
            shapes = _source_shapes(rule, held, max(1, sizes.key_value_heads))
            for name, shape in zip(instance.hf, shapes, strict=True):
                if name != ZERO:
                    made.setdefault(Ref("", "", name), Spec(first.dtype, shape))
    if missing:
        raise CheckpointError(f"{mm.directory} lacks {len(missing)} tensors: {listed(missing)}; nothing was written")
    return made


def compose(first: Iterable[Segment], second: Iterable[Segment]) -> list[Segment]:
    """Join two relations that begin at the same tensors: segments from the targets of `first` to those of `second`.

    Where several targets of `first` hold the same range, the first reader of the range gets all of them, so that they
    are compared once; further readers get one. What one layout has padded is nothing to the other.
    """
    first, second = list(first), list(second)
    padding = [*(s.reversed() for s in first if s.is_padding), *(s for s in second if s.is_padding)]
    holders: dict[tuple[Ref, int], dict[int, list[Segment]]] = defaultdict(lambda: defaultdict(list))
    for segment in first:
        if segment.is_padding:
            continue
        holders[segment.source, segment.source_dim][segment.source_start].append(segment)
    starts = {key: sorted(ranges) for key, ranges in holders.items()}
    compared: set[tuple[Ref, int, int]] = set()
    # One chain for each target and each of the claims to it; neighbours in a chain are often one range.
    chains: dict[tuple[int, Ref], list[Segment]] = defaultdict(list)
    for wanted in second:
        if wanted.is_padding:
            continue
        key, position = (wanted.source, wanted.source_dim), wanted.source_start
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
                    transposed=claim.transposed != wanted.transposed,
                )
                _append(chains[number, wanted.target], part)
            compared.add(mark)
            position = end
    joined = [segment for _, chain in sorted(chains.items(), key=lambda item: item[0][0]) for segment in chain]
    return [*joined, *padding]


def _append(chain: list[Segment], part: Segment) -> None:
    """Add a segment to those of one target, as a longer one where it goes on from the last."""
    last = chain[-1] if chain else None
    if (
        last is not None
        and (last.source, last.dim, last.transposed) == (part.source, part.dim, part.transposed)
        and last.source_start + last.length == part.source_start
        and last.target_start + last.length == part.target_start
    ):
        chain[-1] = last._replace(length=last.length + part.length)
    else:
        chain.append(part)


def _source_shapes(rule: Rule, shapes: Sequence[Shape], unit: int) -> list[Shape]:
    """Shapes of a rule's sources that give the tensor-parallel ranks tensors of these shapes.

    Args:
        rule: the rule.
        shapes: what each rank holds.
        unit: the length of what is smallest among fused sources, where they are not equal.
    """
    count, dim, shape = len(rule.hf), rule.operation.dim, shapes[0]
    lengths = [(*held[dim : dim + 1], 0)[0] for held in shapes]
    alike = [lengths[0]] * len(shapes)
    for wanted, total in ((lengths, sum(lengths)), (alike, lengths[0]), (alike, sum(alike))):
        equal = [total // count] * count
        uneven = [total - (count - 1) * unit, *[unit] * (count - 1)]
        for parts in (equal, uneven):
            sources = [(*shape[:dim], n, *shape[dim + 1 :]) for n in parts]
            sources = [s[::-1] if isinstance(rule.operation, Transposed) else s for s in sources]
            if sum(parts) == total and _makes(rule.operation, sources, wanted):
                return sources
    raise CheckpointError(
        f"{rule.mm} has shape {list(shape)} on each of {len(shapes)} tensor-parallel ranks, which no tensors"
        f" {', '.join(rule.hf)} give; is it a checkpoint of this model?"
    )


def _makes(operation: Operation, sources: Sequence[Shape], held: Sequence[int]) -> bool:
    try:
        ranks = operation.pieces(sources, len(held))
    except LayoutError:
        return False
    return [sum(piece.stop - piece.start for piece in pieces) for pieces in ranks] == list(held)


def _on_each_rank(layout: Layout, instance: Instance, tp_size: int) -> list[Ref]:
    """A target on those tensor-parallel ranks that together hold it."""
    pp_rank, _ = layout.place(instance.stage)
    section = layout.section(instance.stage)
    folders = [layout.rank_dir(tp_rank, pp_rank, instance.ep_ranks[0]) for tp_rank in range(tp_size)]
    return [Ref(f"{folder}/{RANK_FILE}", section, instance.mm) for folder in folders]


def check_dtypes(mm: MegatronFolder, held: Specs) -> None:
    """Raise CheckpointError if a rank holds a tensor in another dtype than expected."""
    wrong = [
        f"{ref.file}: {ref.name} is {mm.tensors[ref].dtype}, elsewhere {spec.dtype}"
        for ref, spec in held.items()
        if mm.tensors[ref].dtype != spec.dtype
    ]
    if wrong:
        raise CheckpointError(f"{mm.directory} holds a tensor in different dtypes on its ranks: {listed(wrong)}")
