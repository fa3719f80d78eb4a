"""Do two folders hold the same model, whatever their layouts, and if not, where do they differ?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.comparing import Side, differing_elements, segment_bytes
from mm_convert.convert import Converter
from mm_convert.errors import CheckpointError, ModelError
from mm_convert.families import CONVERTERS
from mm_convert.families.canonical import as_it_stands, is_canonical
from mm_convert.huggingface import HuggingFaceFolder
from mm_convert.inspection import converters_for, converters_of, inspect, is_megatron, trusted_manifest
from mm_convert.journal import MANIFEST, short_name
from mm_convert.megatron import MegatronFolder
from mm_convert.model_sizes import heads, sizes_on_disk
from mm_convert.plans import ZEROS, Plan, Ref, Segment, Spec, Specs
from mm_convert.progress import progress
from mm_convert.relate import relate
from mm_convert.resplit import compose, paper_tensors
from mm_convert.stored import StoredFile
from mm_convert.vocabulary import explained, rows, without_padding

Folder = HuggingFaceFolder | MegatronFolder


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One tensor that is not the same.

    Attributes:
        kind: ``missing`` (in one of the two), ``shape``, ``dtype`` or ``bytes``.
        name: the tensor, with its file in a Megatron folder.
        detail: where it is missing, both shapes or dtypes, or the other folder's names of it.
        elements: how many elements differ; None where they can't be counted.
        of: elements of the tensor.
    """

    kind: str
    name: str
    detail: str
    elements: int | None = None
    of: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two folders have in common.

    Attributes:
        differences: empty if they hold the same model.
        tensors: tensors of the second that were compared.
        nbytes: their bytes.
        how: ``bytes`` (read and compared) or ``manifests``.
    """

    differences: tuple[Difference, ...]
    tensors: int
    nbytes: int
    how: str

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def verify(a: str | Path, b: str | Path, *, full: bool = False) -> Comparison:
    """Compare two checkpoint folders, each Hugging Face or Megatron in any layout, tensor by tensor.

    Manifests decide where they can and no file was touched since: two folders of the same layout, or a folder that was
    made from a Megatron folder that has a manifest too. Otherwise all bytes are read, through small buffers.

    Args:
        a: the first, which must be a whole model if the layouts differ.
        b: the second.
        full: read all bytes even where manifests would do.

    Raises:
        CheckpointError: not comparable: no checkpoint, or damaged.
        ModelError: no converter knows the model.
    """
    first, second = _open(Path(a)), _open(Path(b))
    if isinstance(second, HuggingFaceFolder) and isinstance(first, MegatronFolder):
        # The rules lead from Hugging Face to Megatron.
        return _compare(second, first, Path(b), Path(a), full=full)
    megatron = isinstance(first, MegatronFolder) and isinstance(second, MegatronFolder)
    if megatron and _begins_badly(first) > _begins_badly(second):
        return _compare(second, first, Path(b), Path(a), full=full)
    return _compare(first, second, Path(a), Path(b), full=full)


def _begins_badly(folder: Folder) -> tuple[bool, bool]:
    """Comparing across layouts begins at a whole model, and best where nothing is fused: nothing tells how long each of
    several fused tensors is."""
    whole = isinstance(folder, MegatronFolder) and bool(converters_of(folder))
    return not whole, not _stands_apart(folder)


def _stands_apart(folder: Folder) -> bool:
    return is_canonical(ref.name for ref in folder.tensors)


def _open(path: Path) -> Folder:
    if is_megatron(path):
        return MegatronFolder.open(path)
    kind = inspect(path).kind  # raises, with the reason, where there is no checkpoint
    if kind != "huggingface":
        commands = "torch_dist_to_hf and torch_dist_to_mm make" if kind == "torch_dist" else "dcp_to_hf makes"
        raise CheckpointError(
            f"{path} is a distributed checkpoint; verify and diff compare Hugging Face and Megatron-style folders:"
            f" {commands} one of it"
        )
    hf = HuggingFaceFolder.open(path)
    names = converters_for(hf)
    return hf.unstacked(CONVERTERS[names[0]].stacked) if names else hf


def _compare(a: Folder, b: Folder, a_path: Path, b_path: Path, *, full: bool) -> Comparison:
    expected, segments = _related(a, b)
    amounts: Any = {"tensors": len(b.tensors), "nbytes": sum(spec.nbytes for spec in b.tensors.values())}
    differences = list(_structural(expected, b.tensors, a_path, b_path))
    if not full and not differences and (_made_from(b_path, a, a_path) or _made_from(a_path, b, b_path)):
        return Comparison(differences=(), how="manifests", **amounts)
    crcs = None if full or differences else _crcs(a_path, a)
    if crcs is not None and crcs == _crcs(b_path, b):
        return Comparison(differences=(), how="manifests", **amounts)
    differences += _unequal(a, b, segments, expected)
    return Comparison(differences=tuple(differences), how="bytes", **amounts)


def _related(a: Folder, b: Folder) -> tuple[dict[Ref, Spec], list[Segment]]:
    """What b must hold if it is a, and the segments from a that make it."""
    if isinstance(a, HuggingFaceFolder) and isinstance(b, HuggingFaceFolder):
        return _by_name(a, b)
    if isinstance(a, MegatronFolder) and isinstance(b, MegatronFolder):
        found = [rows(mm.tensors, mm.layout) for mm in (a, b)]
        padded = any(mm.vocabulary not in (0, sum(held)) for mm, held in zip((a, b), found, strict=True))
        alike = a.layout == b.layout and found[0] == found[1] and _stands_apart(a) == _stands_apart(b)
        if alike and not padded:
            same = [Segment(ref, 0, ref, 0, (spec.shape or (1,))[0], 0) for ref, spec in a.tensors.items()]
            return dict(a.tensors), same
        return _resplit(a, b)
    if isinstance(a, HuggingFaceFolder) and isinstance(b, MegatronFolder):
        names = converters_for(a)
        if not names:
            raise ModelError(f"{a.directory}: no converter knows model_type {a.config.get('model_type')!r}")
        converter = Converter.named(names[0], canonical=_stands_apart(b))
        converter.sizes(a).check_whole(b.layout, b.directory)
        layout = explained(b.layout, rows(b.tensors, b.layout), converter.tokens(a)) or b.layout
        plan = converter.plan_hf_to_mm(a, layout)
        return dict(plan.targets), _held_by_both(plan)
    raise AssertionError("verify puts the Hugging Face folder first")


def _resplit(a: MegatronFolder, b: MegatronFolder) -> tuple[dict[Ref, Spec], list[Segment]]:
    names = converters_of(a)
    if not names:
        raise ModelError(
            f"neither {a.directory} nor {b.directory} holds just the tensors of a model that a converter knows; folders"
            " of one layout can be compared all the same"
        )
    of_a, of_b = (as_it_stands(CONVERTERS[names[0]], (r.name for r in mm.tensors)) for mm in (a, b))
    if _stands_apart(a) != _stands_apart(b) and None in heads(of_a, a):
        raise ModelError(
            f"one of {a.directory} and {b.directory} holds query, key and value apart, the other fused: where each head"
            " stands can't be told of a model that is none of the published sizes; compare both with its Hugging Face"
            " folder"
        )
    sizes = sizes_on_disk(of_a, a, b.layout, legal=True)
    sizes.check_whole(b.layout, b.directory)
    found = [rows(mm.tensors, mm.layout) for mm in (a, b)]
    # Where no manifest tells, the tokens are at most the rows of the folder that has fewer.
    vocabulary = a.vocabulary or b.vocabulary or min(map(sum, found))
    layouts = [explained(mm.layout, held, vocabulary) for mm, held in zip((a, b), found, strict=True)]
    between = paper_tensors(of_a, sizes, a)
    if vocabulary and layouts[0]:
        between = without_padding(of_a.rules(sizes, a.layout.pp_size), between, vocabulary)
    _, there = relate(of_a, sizes, layouts[0] or a.layout, between)
    targets, onwards = relate(of_b, sizes, layouts[1] or b.layout, between)
    return targets, _held_by_both(Plan.build(a.tensors, targets, compose(there, onwards)))


def _by_name(a: HuggingFaceFolder, b: HuggingFaceFolder) -> tuple[dict[Ref, Spec], list[Segment]]:
    """Old and new names are the same name."""
    known = converters_for(a)

    def canonical(ref: Ref) -> str:
        return Converter.named(known[0]).family.canonical(ref.name) if known else ref.name

    there = {canonical(ref): ref for ref in b.tensors}
    expected, segments = {}, []
    for ref, spec in a.tensors.items():
        target = there.get(canonical(ref), ref)
        expected[target] = spec
        segments.append(Segment(ref, 0, target, 0, (spec.shape or (1,))[0], 0))
    return expected, segments


def _structural(expected: Specs, found: Specs, a: Path, b: Path) -> Iterable[Difference]:
    for ref, spec in expected.items():
        if ref not in found:
            yield Difference(kind="missing", name=_name(ref), detail=f"in {b}")
        elif found[ref].shape != spec.shape:
            detail = f"{list(spec.shape)} by {a}, {list(found[ref].shape)} in {b}"
            yield Difference(kind="shape", name=_name(ref), detail=detail)
        elif found[ref].dtype != spec.dtype:
            yield Difference(kind="dtype", name=_name(ref), detail=f"{spec.dtype} by {a}, {found[ref].dtype} in {b}")
    for ref in found:
        if ref not in expected:
            yield Difference(kind="missing", name=_name(ref), detail=f"in {a}")


def _unequal(a: Folder, b: Folder, segments: Iterable[Segment], expected: Specs) -> Iterable[Difference]:
    sides = Side(tensors=a.tensors, files=a.files), Side(tensors=b.tensors, files=b.files)
    comparable = [s for s in segments if b.tensors.get(s.target) == expected[s.target]]
    counts: dict[Ref, int] = {}
    origins: dict[Ref, list[str]] = {}
    with progress(sum(segment_bytes(segment, sides[0]) for segment in comparable)) as advance:
        for segment in comparable:
            count = differing_elements(segment, *sides)
            advance(segment_bytes(segment, sides[0]))
            if count:
                counts[segment.target] = counts.get(segment.target, 0) + count
                names = origins.setdefault(segment.target, [])
                names += [segment.source.name] if segment.source.name not in names else []
    for ref, count in counts.items():
        names = [name for name in origins[ref] if name != ref.name]
        of = prod(expected[ref].shape)
        detail = f"from {', '.join(names)}" if names else ""
        yield Difference(kind="bytes", name=_name(ref), detail=detail, elements=count, of=of)


def _held_by_both(plan: Plan) -> list[Segment]:
    """Each copy must agree. What was made out of nothing, or has no place, is nowhere to be compared with."""
    return [s for s in plan.segments() if ZEROS not in (s.source.section, s.target.section)]


def _made_from(path: Path, source: Folder, source_path: Path) -> bool:
    """Whether a folder's manifest says that it was made from `source`, and neither was touched since.

    A manifest knows its sources by their headers and samples. Only a torch file's header has digests of the tensors
    (and only where we wrote it are they sure to be right); a byte of safetensors may have changed between samples.
    """
    manifest = trusted_manifest(path)
    if manifest is None or trusted_manifest(source_path) is None or not isinstance(source, MegatronFolder):
        return False
    files = {short_name(file.path): {"size": file.size, "fingerprint": file.digest} for file in source.files.values()}
    return manifest.get("sources") == files and _older(source.files.values(), path / MANIFEST)


def _crcs(path: Path, folder: Folder) -> dict[str, str] | None:
    """Every tensor's digest, from the manifest, if no file was touched since."""
    manifest = trusted_manifest(path)
    # A folder may hold files that its manifest does not name: a trainer's later iteration.
    if manifest is None or not _older(folder.files.values(), path / MANIFEST):
        return None
    entries = [(file, entry["crc32"]) for file, entry in manifest["outputs"].items()]
    # Of a Megatron folder by file, without the iteration's folder; of a Hugging Face folder by name alone.
    kept = isinstance(folder, MegatronFolder)
    return {
        f"{file.partition('/')[2] if kept else ''}:{name}": crc for file, crcs in entries for name, crc in crcs.items()
    }


def _older(files: Iterable[StoredFile], than: Path) -> bool:
    made = than.stat().st_mtime_ns
    return all(max(file.mtime_ns, file.path.stat().st_ctime_ns) <= made for file in files)


def _name(ref: Ref) -> str:
    return f"{ref.file}: {ref.name}" if ref.section else ref.name
