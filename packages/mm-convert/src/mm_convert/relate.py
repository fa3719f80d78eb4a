"""Rules applied: which slices of the Hugging Face tensors make the tensors of every rank."""

from __future__ import annotations

from collections.abc import Iterable

from mm_convert.errors import CheckpointError, LayoutError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.layout import RANK_FILE, Layout
from mm_convert.plan import Ref, Segment, Spec, Specs, listed
from mm_convert.rules import Rule


def relate(
    family: Family,
    sizes: ModelSizes,
    layout: Layout,
    hf: Specs,
    *,
    parts: Iterable[str] = ("llm", "vit"),
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
    sizes.check(layout)
    found = _by_canonical_name(family, hf)
    targets: dict[Ref, Spec] = {}
    segments: list[Segment] = []
    used: set[str] = set()
    missing: list[str] = []
    for rule in family.rules(sizes, layout.pp_size):
        if rule.part not in parts:
            continue
        for stage, i, j in places(rule, layout):
            names = [name.format(i=i) for name in rule.hf]
            absent = [name for name in names if name not in found]
            used.update(names)
            if absent:
                missing += [] if rule.optional else absent
                continue
            _apply(
                rule, layout, stage, rule.mm.format(j=j), [(found[n], hf[found[n]]) for n in names], targets, segments
            )
    unknown = [found[name].name for name in found if name not in used]
    if missing or unknown:
        raise CheckpointError(_mismatch("the Hugging Face checkpoint", missing, unknown))
    return targets, segments


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


def _apply(
    rule: Rule,
    layout: Layout,
    stage: int,
    mm_name: str,
    sources: list[tuple[Ref, Spec]],
    targets: dict[Ref, Spec],
    segments: list[Segment],
) -> None:
    dim, shapes = rule.operation.dim, [spec.shape for _, spec in sources]
    dtype = _common_dtype(sources, dim)
    pp_rank, _ = layout.place(stage)
    for tp_rank, pieces in enumerate(rule.operation.pieces(shapes, layout.tp_size)):
        file = f"{layout.rank_dir(tp_rank, pp_rank)}/{RANK_FILE}"
        target = Ref(file, layout.section(stage), mm_name)
        position = 0
        for piece in pieces:
            length = piece.stop - piece.start
            segments.append(Segment(sources[piece.source][0], piece.start, target, position, length, dim))
            position += length
        shape = list(shapes[0])
        shape[dim] = position
        targets[target] = Spec(dtype, tuple(shape))


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


def places(rule: Rule, layout: Layout) -> list[tuple[int, int, int]]:
    """Where a rule applies: (stage, global layer, layer inside the stage).

    Raises:
        LayoutError: on the first or last stage of a part that has no layer.
    """
    stages = layout.stages(rule.part)
    if rule.where in ("first", "last"):
        if not any(stages):
            raise LayoutError(f"{rule.mm} needs a stage with {rule.part} layers, but the layout has none: {layout}")
        return [(layout.first_stage(rule.part) if rule.where == "first" else layout.last_stage(rule.part), 0, 0)]
    if rule.where in ("start", "end"):
        return [(0 if rule.where == "start" else len(stages) - 1, 0, 0)]
    layers = [(s, i, j) for s, held in enumerate(stages) for j, i in enumerate(held)]
    return layers if rule.where == "layer" else [layer for layer in layers if layer[1] == rule.where]


def _by_canonical_name(family: Family, hf: Specs) -> dict[str, Ref]:
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
