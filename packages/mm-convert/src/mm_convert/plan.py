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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from mm_convert.errors import CheckpointError, TotalityError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.layout import Layout
from mm_convert.rules import Rule, Shape

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
    """``target[target_start : target_start + length] = source[source_start : …]`` along `dim`."""

    source: Ref
    source_start: int
    target: Ref
    target_start: int
    length: int
    dim: int

    def reversed(self) -> Segment:
        """The same segment, read the other way."""
        return Segment(self.target, self.target_start, self.source, self.source_start, self.length, self.dim)


Specs = Mapping[Ref, Spec]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A total conversion.

    Attributes:
        sources: every tensor read.
        targets: every tensor made.
        writes: the segments of each target, in order; together they tile it.
        checks: segments whose bytes must equal what stands in the target already.
    """

    sources: Specs
    targets: Specs
    writes: Mapping[Ref, tuple[Segment, ...]]
    checks: Mapping[Ref, tuple[Segment, ...]]

    @classmethod
    def build(cls, sources: Specs, targets: Specs, segments: Iterable[Segment]) -> Plan:
        """Order the segments and prove the plan total.

        Raises:
            TotalityError: bytes of a source unused, or of a target unwritten or written twice.
        """
        writes: dict[Ref, tuple[Segment, ...]] = {}
        checks: dict[Ref, tuple[Segment, ...]] = {}
        by_target = _group(segments, "target")
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
            raise TotalityError(f"segments write tensors that are no target: {_names(by_target)}")
        _prove_used(sources, [s for part in (writes, checks) for ss in part.values() for s in ss])
        return cls(sources=sources, targets=targets, writes=writes, checks=checks)

    def files(self) -> dict[str, list[Ref]]:
        """The targets of each file to write, in order."""
        files: dict[str, list[Ref]] = {}
        for ref in self.targets:
            files.setdefault(ref.file, []).append(ref)
        return files

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(spec.nbytes for spec in self.targets.values())


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
        for stage, i, j in _places(rule, layout):
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
        raise CheckpointError(f"{what} has tensors of the wrong shape: {_listed(wrong)}")


def _apply(
    rule: Rule,
    layout: Layout,
    stage: int,
    mm_name: str,
    sources: list[tuple[Ref, Spec]],
    targets: dict[Ref, Spec],
    segments: list[Segment],
) -> None:
    shapes = [spec.shape for _, spec in sources]
    dtypes = {spec.dtype for _, spec in sources}
    if len(dtypes) != 1:
        raise CheckpointError(
            f"{', '.join(ref.name for ref, _ in sources)} become one tensor, but have dtypes {sorted(dtypes)};"
            " save the checkpoint in one dtype first"
        )
    dim = rule.operation.dim
    pp_rank, _ = layout.place(stage)
    for tp_rank, pieces in enumerate(rule.operation.pieces(shapes, layout.tp_size)):
        file = f"{layout.rank_dir(tp_rank, pp_rank)}/model_optim_rng.pt"
        target = Ref(file, layout.section(stage), mm_name)
        position = 0
        for piece in pieces:
            length = piece.stop - piece.start
            segments.append(Segment(sources[piece.source][0], piece.start, target, position, length, dim))
            position += length
        shape = list(shapes[0])
        shape[dim] = position
        targets[target] = Spec(dtypes.copy().pop(), tuple(shape))


def _places(rule: Rule, layout: Layout) -> list[tuple[int, int, int]]:
    """Where a rule applies: (stage, global layer, layer inside the stage)."""
    if rule.where == "first":
        return [(layout.first_stage(rule.part), 0, 0)]
    if rule.where == "last":
        return [(layout.last_stage(rule.part), 0, 0)]
    return [(s, i, j) for s, layers in enumerate(layout.stages(rule.part)) for j, i in enumerate(layers)]


def _by_canonical_name(family: Family, hf: Specs) -> dict[str, Ref]:
    found: dict[str, Ref] = {}
    for ref in hf:
        other = found.setdefault(family.canonical(ref.name), ref)
        if other is not ref:
            raise CheckpointError(f"{ref.name} stands twice: in {other.file} as {other.name}, and in {ref.file}")
    return found


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
        for dim in {s.dim for s in by_source[ref]} or {0}:
            position = 0
            for start, length in sorted((s.source_start, s.length) for s in by_source[ref] if s.dim == dim):
                if start > position:
                    break
                position = max(position, start + length)
            if position != spec.shape[dim]:
                raise TotalityError(
                    f"{ref.name} of shape {list(spec.shape)}: only {position} of {spec.shape[dim]} are used"
                )


def _mismatch(what: str, missing: list[str], unknown: list[str]) -> str:
    parts = [f"{what} does not hold the tensors that its configuration asks for;"]
    if missing:
        parts.append(f"missing {len(missing)}: {_listed(missing)};")
    if unknown:
        parts.append(f"unknown {len(unknown)}: {_listed(unknown)};")
    return " ".join([*parts, "nothing was written"])


def _listed(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f", and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def _names(refs: Iterable[Ref]) -> str:
    return _listed([ref.name for ref in refs])
