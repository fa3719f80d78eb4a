"""Rules applied: which slices of the Hugging Face tensors make the tensors of every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mm_convert.errors import CheckpointError, LayoutError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.layout import PARTS, RANK_FILE, Layout
from mm_convert.plans import PADDED, ZEROS, Ref, Segment, Spec, Specs, listed
from mm_convert.rules import PADDING, ZERO, Rule, is_turned
from mm_convert.vocabulary import laid_out


def relate(
    family: Family,
    sizes: ModelSizes,
    layout: Layout,
    hf: Specs,
    *,
    parts: Iterable[str] = PARTS,
) -> tuple[dict[Ref, Spec], list[Segment]]:
    """Apply a family's rules to Hugging Face tensors.

    Args:
        family: the model family.
        sizes: the model's numbers.
        layout: the Megatron layout.
        hf: the Hugging Face tensors.
        parts: the parts of the model to relate; `hf` must hold just these.

    Returns:
        The Megatron tensors (files named from the iteration's folder on) and the segments from `hf`.

    Raises:
        LayoutError: the layout does not fit the model.
        CheckpointError: tensors missing, unknown, or of different dtypes inside one fused tensor.
    """
    family.check(layout)
    sizes.check(layout)
    found = by_canonical_name(family, hf)
    relation = _Relation(layout=layout, hf=hf, targets={}, segments=[])
    used: set[str] = set()
    missing: list[str] = []
    for rule in laid_out(family.rules(sizes, layout.pp_size), layout):
        if rule.part not in parts:
            continue
        for instance in instances(rule, sizes, layout):
            names = [name for name in instance.hf if name != ZERO]
            absent = [name for name in names if name not in found]
            used.update(names)
            if absent:
                missing += [] if rule.optional else absent
                continue
            relation.add(rule, instance, found)
    unknown = [found[name].name for name in found if name not in used]
    missing = list(dict.fromkeys(missing))
    if missing or unknown:
        raise CheckpointError(_mismatch("the Hugging Face checkpoint", missing, unknown))
    return relation.targets, relation.segments


def check_same(found: Specs, expected: Specs, what: str) -> None:
    """Raise CheckpointError unless both hold the same tensors with the same shapes."""
    missing = [f"{ref.file}: {ref.name}" for ref in expected if ref not in found]
    unknown = [f"{ref.file}: {ref.name}" for ref in found if ref not in expected]
    if missing or unknown:
        raise CheckpointError(_mismatch(what, missing, unknown))
    wrong = [
        f"{ref.file}: {ref.name} is {list(found[ref].shape)}, expected {list(spec.shape)}"
        for ref, spec in expected.items()
        if found[ref].shape != spec.shape
    ]
    if wrong:
        raise CheckpointError(f"{what} has tensors of the wrong shape: {listed(wrong)}")


@dataclass(frozen=True)
class Instance:
    """A rule at one place.

    Attributes:
        hf: the sources' names, `ZERO` among them.
        mm: the target's name.
        stage: where it stands.
        ep_ranks: the expert-parallel ranks that hold it.
    """

    hf: tuple[str, ...]
    mm: str
    stage: int
    ep_ranks: range


def instances(rule: Rule, sizes: ModelSizes, layout: Layout) -> Iterator[Instance]:
    """Every place at which a rule applies, a copy on another rank being a place of its own.

    Raises:
        LayoutError: on the first or last stage of a part that has no layer.
    """
    everywhere = range(layout.ep_size)
    share = sizes.experts // layout.ep_size
    for stage, i, j in _places(rule, layout):
        if not any("{x}" in name for name in rule.hf):
            yield Instance(tuple(n.format(i=i) for n in rule.hf), rule.mm.format(j=j), stage, everywhere)
            continue
        for x in range(sizes.experts):
            rank, y = divmod(x, share)
            names = tuple(n.format(i=i, x=x) for n in rule.hf)
            yield Instance(names, rule.mm.format(j=j, y=y), stage, everywhere[rank : rank + 1])


@dataclass(frozen=True)
class _Relation:
    """What rules have made so far."""

    layout: Layout
    hf: Specs
    targets: dict[Ref, Spec]
    segments: list[Segment]

    def add(self, rule: Rule, instance: Instance, found: Mapping[str, Ref]) -> None:
        """Apply a rule at one place."""
        operation, dim = rule.operation, rule.operation.dim
        refs = [
            Ref("", ZEROS, f"{instance.hf[0]} ({number})") if name == ZERO else found[name]
            for number, name in enumerate(instance.hf)
        ]
        held = [ref for ref in refs if ref.section != ZEROS]
        shapes = [self.hf[held[0] if ref.section == ZEROS else ref].shape for ref in refs]
        transposed = is_turned(operation, shapes[0])
        source_dim = 1 - dim if transposed else dim
        dtype = _common_dtype([(ref, self.hf[ref]) for ref in held], source_dim)
        own_tp = self.layout.tp(rule.part)
        cut = operation.pieces(shapes, own_tp)
        padding = Ref("", ZEROS, f"{PADDED}{instance.hf[0]}")
        pp_rank, _ = self.layout.place(instance.stage)
        whole = list(shapes[0][::-1] if transposed else shapes[0])
        for tp_rank in range(self.layout.tp_size):
            for ep_rank in instance.ep_ranks:
                file = f"{self.layout.rank_dir(tp_rank, pp_rank, ep_rank)}/{RANK_FILE}"
                target = Ref(file, self.layout.section(instance.stage), instance.mm)
                position = 0
                for piece in cut[tp_rank % own_tp]:
                    length = piece.stop - piece.start
                    source = padding if piece.source == PADDING else refs[piece.source]
                    self.segments.append(Segment(source, piece.start, target, position, length, dim, transposed))
                    position += length
                shape = list(whole)
                shape[dim] = position
                self.targets[target] = Spec(dtype, tuple(shape))


def _common_dtype(sources: list[tuple[Ref, Spec]], dim: int) -> str:
    """The dtype of tensors that become one; they must agree in it, and in every dimension but `dim`."""
    names = ", ".join(ref.name for ref, _ in sources)
    dtypes = {spec.dtype for _, spec in sources}
    if len(dtypes) != 1:
        raise CheckpointError(
            f"{names} become one tensor, but have dtypes {sorted(dtypes)}; save the checkpoint in one dtype first"
        )
    shapes = [spec.shape for _, spec in sources]
    if any(len(shape) <= dim for shape in shapes) or len({(*s[:dim], *s[dim + 1 :]) for s in shapes}) != 1:
        raise CheckpointError(
            f"{names} have shapes {', '.join(str(list(shape)) for shape in shapes)}; they can't be cut along dimension"
            f" {dim} and joined: is this the checkpoint of its config.json?"
        )
    return dtypes.pop()


def _places(rule: Rule, layout: Layout) -> list[tuple[int, int, int]]:
    """Where a rule applies: (stage, global layer, layer inside the stage)."""
    stages = layout.stages(rule.part)
    if rule.where in ("first", "last"):
        if not any(stages):
            raise LayoutError(f"{rule.mm} needs a stage with {rule.part} layers, but the layout has none: {layout}")
        ends = layout.first_stages(rule.part) if rule.where == "first" else layout.last_stages(rule.part)
        return [(stage, 0, 0) for stage in ends]
    if rule.where in ("start", "end"):
        return [(0 if rule.where == "start" else len(stages) - 1, 0, 0)]
    layers = [(s, i, j) for s, held in enumerate(stages) for j, i in enumerate(held)]
    return layers if rule.where == "layer" else [layer for layer in layers if layer[1] == rule.where]


def by_canonical_name(family: Family, hf: Specs) -> dict[str, Ref]:
    """The tensors of a Hugging Face folder by the names that the rules use.

    Raises:
        CheckpointError: two have one name.
    """
    found: dict[str, Ref] = {}
    for ref in hf:
        other = found.setdefault(family.canonical(ref.name), ref)
        if other is not ref:
            raise CheckpointError(f"{ref.name} stands twice: in {other.file} as {other.name}, and in {ref.file}")
    return found


def _mismatch(what: str, missing: list[str], unknown: list[str]) -> str:
    parts = [f"{what} does not hold the tensors that its configuration asks for;"]
    if missing:
        parts.append(f"missing {len(missing)}: {listed(missing)};")
    if unknown:
        parts.append(f"unknown {len(unknown)}: {listed(unknown)};")
    return " ".join([*parts, "nothing was written"])
