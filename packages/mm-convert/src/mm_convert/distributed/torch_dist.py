"""megatron-core's distributed checkpoints (``torch_dist``): from and to Hugging Face and rank folders.

Whatever the parallel sizes of the run that wrote it, such a checkpoint holds whole tensors, in pieces; whatever those
of the run that loads it, megatron-core takes the pieces that it needs. So it is the layout of one rank under other
names (see :mod:`mm_convert.distributed.megatron_keys`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.convert import Converter
from mm_convert.distributed.dcp import STATE, check_total, distributed_target
from mm_convert.distributed.folder import DistributedFolder
from mm_convert.distributed.megatron_keys import Place, extra_states, places, shortened, variants
from mm_convert.distributed.pieces import Piece, with_sources, with_targets
from mm_convert.distributed.writing import Stored, as_bytes
from mm_convert.errors import LayoutError
from mm_convert.execution import Target
from mm_convert.families import Family
from mm_convert.families.canonical import is_canonical
from mm_convert.families.family import ModelSizes
from mm_convert.huggingface import HuggingFaceFolder, read_config
from mm_convert.journal import read_manifest
from mm_convert.layout import RANK_FILE, GivenLayout, Layout
from mm_convert.megatron import CHECKPOINT_VERSION, MegatronFolder
from mm_convert.plans import Plan, Ref, Spec
from mm_convert.relate import instances
from mm_convert.resplit import plan_resplit, tokens
from mm_convert.rules import Shape
from mm_convert.targets import Conversion, huggingface_target, megatron_target
from mm_convert.template import Template
from mm_convert.torch_layout import TorchLayout
from mm_convert.vocabulary import checked, dropped, recorded, rows, told

GATED = re.compile(r"\.linear_fc1\.(weight|bias)$")
FILE_BYTES = 5 << 30
NO_STATES = b"]Na"  # [None]
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def prepare_hf_to_torch_dist(
    converter: Converter, hf_dir: str | Path, dist_dir: str | Path, *, make_vocab_size_divisible_by: int = 0
) -> Conversion:
    """Plan Hugging Face → torch_dist; only headers are read.

    Args:
        converter: the model family.
        hf_dir: the Hugging Face folder.
        dist_dir: the folder to write.
        make_vocab_size_divisible_by: what the vocabulary's rows are rounded up to a multiple of, with zeros; 0 for as
            many as there are tokens, which megatron-core loads at any padding.

    Raises:
        ConvertError: the checkpoint does not fit its configuration.
    """
    hf = HuggingFaceFolder.open(hf_dir)
    layout = Layout.undivided(converter.sizes(hf).layers, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    plan = converter.plan_hf_to_mm(hf, layout)
    options = {"command": "hf_to_torch_dist", "layout": "torch_dist", **told(layout, converter.tokens(hf))}
    made, target = _torch_dist_target(plan, Path(dist_dir), options)
    return Conversion(
        plan=made,
        source=f"{hf_dir} (Hugging Face)",
        files=hf.unstacked(converter.family.stacked).files,
        target=target,
        folders=[Path(hf_dir)],
    )


def prepare_mm_to_torch_dist(
    converter: Converter,
    mm_dir: str | Path,
    dist_dir: str | Path,
    *,
    layout: GivenLayout | None = None,
    hf_dir: str | Path | None = None,
    make_vocab_size_divisible_by: int = 0,
) -> Conversion:
    """Plan rank folders → torch_dist; only headers are read.

    Args:
        converter: the model family.
        mm_dir: the Megatron folder.
        dist_dir: the folder to write.
        layout: what the caller believes; the layout itself is read from disk.
        hf_dir: a folder with the model's ``config.json``, where tensors alone don't tell enough.
        make_vocab_size_divisible_by: as in :func:`prepare_hf_to_torch_dist`.

    Raises:
        ConvertError: the checkpoint is not whole, not of the given layout, or of the canonical structure.
    """
    mm = MegatronFolder.open(mm_dir, layout)
    if is_canonical(ref.name for ref in mm.tensors):
        raise LayoutError(
            f"{mm.directory} holds query, key and value apart, megatron-core's model holds them fused; go by way of"
            " mm_to_hf and hf_to_torch_dist"
        )
    undivided = Layout.undivided(mm.layout.layers, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    plan = converter.plan_resplit(mm, undivided, hf_dir=hf_dir)
    options = {
        "command": "mm_to_torch_dist",
        "layout": "torch_dist",
        **told(undivided, converter.tokens_of(mm, hf_dir)),
    }
    made, target = _torch_dist_target(plan, Path(dist_dir), options)
    source = f"{mm.directory} ({mm.layout})"
    return Conversion(plan=made, source=source, files=mm.files, target=target, folders=[Path(mm_dir)])


def prepare_torch_dist_to_hf(
    converter: Converter,
    dist_dir: str | Path,
    hf_dir: str | Path,
    save_hf_dir: str | Path,
    *,
    hf_naming: str = "template",
    padded_to_multiple_of: int = 0,
) -> Conversion:
    """Plan torch_dist → Hugging Face, with the names and shards of `hf_dir`; only headers are read.

    Args:
        converter: the model family.
        dist_dir: the folder with ``.metadata``, or the one above it.
        hf_dir: the template: configuration, tokenizer, names and shards.
        save_hf_dir: the folder to write.
        hf_naming: ``template`` for the template's own names, or one of the family's spellings.
        padded_to_multiple_of: what the run rounded the vocabulary up to a multiple of; 0 to find it.

    Raises:
        ConvertError: the checkpoint does not fit the model.
    """
    hf, folder = HuggingFaceFolder.open(hf_dir), DistributedFolder.open(dist_dir)
    sizes = converter.sizes(hf)
    mm, pieces = _undivided_folder(converter.family, folder, sizes, Path(dist_dir), padded_to_multiple_of)
    template = Template(hf=hf, family=converter.family, sizes=sizes, naming=hf_naming, kept={})
    plan = with_sources(template.plan(mm), pieces)
    options = {"command": "torch_dist_to_hf", "layout": "Hugging Face", "hf_naming": hf_naming, **dropped(plan)}
    target = huggingface_target(template.written(plan), hf, save_hf_dir, options, template.config())
    return _conversion(plan, folder, pieces, target, [Path(dist_dir), Path(hf_dir)])


def prepare_torch_dist_to_mm(
    converter: Converter,
    dist_dir: str | Path,
    mm_dir: str | Path,
    layout: Layout,
    *,
    hf_dir: str | Path,
    padded_to_multiple_of: int = 0,
) -> Conversion:
    """Plan torch_dist → rank folders; only headers are read.

    Args:
        converter: the model family.
        dist_dir: the folder with ``.metadata``, or the one above it.
        mm_dir: the folder to write.
        layout: how to cut the model.
        hf_dir: a folder with the model's ``config.json``, the only file of it that is read.
        padded_to_multiple_of: as in :func:`prepare_torch_dist_to_hf`.

    Raises:
        ConvertError: the checkpoint does not fit the model, or the layout does not.
    """
    folder = DistributedFolder.open(dist_dir)
    sizes = converter.sizes_of(read_config(Path(hf_dir)), Path(hf_dir))
    mm, pieces = _undivided_folder(converter.family, folder, sizes, Path(dist_dir), padded_to_multiple_of)
    plan = with_sources(plan_resplit(converter.family, sizes, mm, layout), pieces)
    options = {
        "command": "torch_dist_to_mm",
        "layout": layout.text(generative=converter.family.generative),
        **told(layout, tokens(sizes, mm)),
    }
    target = megatron_target(plan, layout, mm_dir, options, generative=converter.family.generative)
    return _conversion(plan, folder, pieces, target, [Path(dist_dir)])


def _conversion(
    plan: Plan,
    folder: DistributedFolder,
    pieces: Mapping[Ref, Sequence[Piece]],
    target: Target,
    folders: Sequence[Path],
) -> Conversion:
    return Conversion(
        plan=plan,
        source=f"{folder.directory} (torch_dist)",
        files=folder.files(piece for held in pieces.values() for piece in held),
        target=target,
        folders=[*folders, folder.directory],
    )


def _torch_dist_target(plan: Plan, directory: Path, options: Mapping[str, Any]) -> tuple[Plan, Target]:
    where = places(ref.name for ref in plan.targets)
    counts: dict[str, Shape] = {}
    for place in where.values():
        before = counts.get(place.key, (0,) * len(place.leading))
        counts[place.key] = tuple(max(n, at + 1) for n, at in zip(before, place.leading, strict=True))
    stored: dict[Ref, Stored] = {}
    moved: dict[Ref, Ref] = {}
    number, taken = 0, 0
    for ref, spec in plan.targets.items():
        if taken and taken + spec.nbytes > FILE_BYTES:
            number, taken = number + 1, 0
        taken += spec.nbytes
        place = where[ref.name]
        label = str(list(place.leading)).replace(" ", "") if place.leading else ""
        moved[ref] = Ref(f"__{number}_0.distcp", label, place.key)
        ones, zeros = (1,) * len(place.leading), (0,) * len(spec.shape)
        whole = counts[place.key] + spec.shape
        stored[moved[ref]] = Stored(place.key, whole, place.leading + zeros, Spec(spec.dtype, ones + spec.shape))
    made = with_targets(plan, moved)
    common = as_bytes(TorchLayout.of("common", [], {}, {"checkpoint_version": CHECKPOINT_VERSION}))
    others = {"common.pt": common, "metadata.json": json.dumps(BACKEND).encode()}
    objects = extra_states(where.values(), counts)
    return made, distributed_target(made, stored, directory, options, objects=objects, value=NO_STATES, others=others)


def _undivided_folder(
    family: Family, folder: DistributedFolder, sizes: ModelSizes, dist_dir: Path, multiple: int
) -> tuple[MegatronFolder, dict[Ref, list[Piece]]]:
    """A checkpoint as if one rank had written it, and the pieces in which it is stored."""
    layout = Layout.undivided(sizes.layers)
    needed: dict[str, bool] = {}
    for rule in family.rules(sizes, layout.pp_size):
        for instance in instances(rule, sizes, layout):
            needed[instance.mm] = needed.get(instance.mm, False) or not rule.optional
    file = f"{layout.rank_dir(0, 0)}/{RANK_FILE}"
    tensors: dict[Ref, Spec] = {}
    pieces: dict[Ref, list[Piece]] = {}
    missing: list[str] = []
    for (name, must), short in zip(needed.items(), shortened(needed), strict=True):
        found = _find(folder, [*variants(short), *(variants(name) if short != name else [])])
        missing += [] if found or not must else [variants(short)[0].key]
        if found:
            ref = Ref(file, layout.section(0), name)
            tensors[ref], pieces[ref] = found
    unused = _unused(folder, pieces)
    check_total(folder.directory, "the tensors that the model asks for", dict.fromkeys(missing), unused)
    held = rows(tensors, layout)
    vocabulary, of_manifest = recorded(read_manifest(dist_dir), held)
    if multiple:
        checked(multiple, held, folder.directory)
    layout = replace(layout, make_vocab_size_divisible_by=multiple or of_manifest)
    mm = MegatronFolder(directory=folder.directory, layout=layout, tensors=tensors, files={}, vocabulary=vocabulary)
    return mm, pieces


def _find(folder: DistributedFolder, candidates: Iterable[Place]) -> tuple[Spec, list[Piece]] | None:
    """The tensor at the first of these places that holds one."""
    for place in candidates:
        depth = len(place.leading)
        gated = GATED.search(place.key)
        for keys in [(place.key,), *([(f"{place.key}_w", f"{place.key}_v")] if gated else [])]:
            if all(key in folder.tensors and len(folder.tensors[key].shape) >= depth for key in keys):
                return _joined(folder, keys, place.leading)
    return None


def _joined(folder: DistributedFolder, keys: Sequence[str], leading: Shape) -> tuple[Spec, list[Piece]]:
    """One tensor out of several that stand one above the other."""
    pieces: list[Piece] = []
    rows = 0
    for key in keys:
        shape = folder.tensors[key].shape[len(leading) :]
        for piece in folder.pieces(key, leading):
            above = (piece.offsets[0] + rows, *piece.offsets[1:]) if piece.offsets else ()
            pieces.append(replace(piece, offsets=above))
        rows += shape[0] if shape else 0
    first = folder.tensors[keys[0]]
    shape = first.shape[len(leading) :]
    return Spec(first.dtype, (rows, *shape[1:]) if shape else ()), pieces


def _unused(folder: DistributedFolder, pieces: Mapping[Ref, Sequence[Piece]]) -> list[str]:
    """Keys of which something is not used, a trainer's own state apart."""
    used: dict[str, int] = defaultdict(int)
    for held in pieces.values():
        for piece in held:
            used[piece.ref.name] += prod(piece.sizes)
    return [key for key, t in sorted(folder.tensors.items()) if used[key] != prod(t.shape) and not STATE.match(key)]
