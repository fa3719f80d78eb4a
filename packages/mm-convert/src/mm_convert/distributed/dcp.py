"""Hugging Face folders to the checkpoints of FSDP2 trainers, and back.

The published layout: ``DIR/release`` holds a state dict ``{"model": {…}, "checkpoint_version": 3.0}`` as
torch.distributed.checkpoint saves it, so a tensor's key is ``model.<dcp_prefix><Hugging Face name>``. One file for each
shard of the source.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_convert.convert import Converter
from mm_convert.distributed.description import metadata
from mm_convert.distributed.folder import DistributedFolder
from mm_convert.distributed.pieces import Piece, whole, with_sources
from mm_convert.distributed.writing import DistcpLayout, Stored
from mm_convert.errors import CheckpointError
from mm_convert.execution import Target
from mm_convert.families import Family
from mm_convert.huggingface import HuggingFaceFolder
from mm_convert.layout import Layout
from mm_convert.megatron import CHECKPOINT_VERSION, TRACKER
from mm_convert.plans import Plan, Ref, Segment, Spec, listed
from mm_convert.rules import Shape
from mm_convert.targets import Conversion, huggingface_target

ROOT = "model."
PREFIXES = ("", "model.")  # the published converters', where none is given
# The experts' matrices of one layer, which the published training code holds as one matrix.
STACKED = re.compile(r"\.experts\.(gate_up|down)_proj$")
EMBEDDING = re.compile(r"(^|\.)embed_tokens\.weight$")
OUTPUT = "lm_head.weight"
VERSION = "checkpoint_version"
VERSION_VALUE = struct.pack(">cd", b"G", CHECKPOINT_VERSION)
# What a trainer saves beside the weights.
STATE = re.compile(r"^(optim|chained_optim|lr_scheduler|opt_param_scheduler|rng_state|rerun_state_machine)")


def prepare_hf_to_dcp(
    hf_dir: str | Path,
    dcp_dir: str | Path,
    *,
    dcp_prefix: str = "",
    tied: Mapping[str, str] | None = None,
    in_memory_names: bool = False,
    family: Family | None = None,
) -> Conversion:
    """Plan Hugging Face → DCP; only headers are read.

    Args:
        hf_dir: the Hugging Face folder.
        dcp_dir: the folder to write.
        dcp_prefix: what stands between ``model.`` and a Hugging Face name.
        tied: further names, and the tensors that they share (``{"lm_head.weight": "model.embed_tokens.weight"}``);
            None writes the output layer of a model whose ``config.json`` ties it, because transformers asks for it.
        in_memory_names: write the names of transformers >= 4.52 (``model.language_model.…``) instead of the folder's.
        family: the model's family, if the tensors are to be checked against it.

    Raises:
        ConvertError: the checkpoint does not fit its configuration, or a tied name has no tensor.
    """
    hf = HuggingFaceFolder.open(hf_dir)
    if family is not None:
        check_family(family, hf)
    spell = _in_memory if in_memory_names else str
    numbers = {file: number for number, file in enumerate(sorted(hf.files))}
    sources, stored, segments = {}, {}, []
    for ref, target_name in [*((ref, spell(ref.name)) for ref in hf.tensors), *_tied(hf, tied, spell)]:
        spec = hf.tensors[ref]
        key = f"{ROOT}{dcp_prefix}{target_name}"
        target = Ref(f"__{numbers[ref.file]}_0.distcp", "", key)
        stored[target] = Stored.alone(key, Spec(spec.dtype, _as_matrix(target_name, spec.shape)))
        sources[ref] = whole({ref: stored[target].spec})[ref]
        segments.append(Segment(ref, 0, target, 0, sources[ref].shape[0], 0))
    plan = Plan.build(sources, whole({ref: piece.spec for ref, piece in stored.items()}), segments)
    options = {"command": "hf_to_dcp", "dcp_prefix": dcp_prefix, "layout": "DCP"}
    paths = {piece.key: ["model", piece.key.removeprefix(ROOT)] for piece in stored.values()}
    paths |= {VERSION: [VERSION]}
    target_folder = distributed_target(
        plan, stored, Path(dcp_dir), options, objects=[VERSION], value=VERSION_VALUE, paths=paths
    )
    return Conversion(
        plan=plan, source=f"{hf_dir} (Hugging Face)", files=hf.files, target=target_folder, folders=[Path(hf_dir)]
    )


def prepare_dcp_to_hf(
    dcp_dir: str | Path,
    hf_dir: str | Path,
    save_hf_dir: str | Path,
    *,
    dcp_prefix: str | None = None,
    tied: Mapping[str, str] | None = None,
    family: Family | None = None,
) -> Conversion:
    """Plan DCP → Hugging Face, with the names and shards of `hf_dir`; only headers are read.

    Args:
        dcp_dir: the folder with ``.metadata``, or the one above it.
        hf_dir: the template: configuration, tokenizer, names and shards.
        save_hf_dir: the folder to write.
        dcp_prefix: what stands between ``model.`` and a Hugging Face name; None finds it.
        tied: as in :func:`prepare_hf_to_dcp`: copies must equal the tensor that they share.
        family: the model's family, whose other spellings of the names are read as well.

    Raises:
        ConvertError: the folder does not hold the template's tensors, or others beside them.
    """
    hf, folder = HuggingFaceFolder.open(hf_dir), DistributedFolder.open(dcp_dir)
    if family is not None:
        check_family(family, hf)
    canonical: Callable[[str], str] = str if family is None else family.canonical
    prefixes = PREFIXES if dcp_prefix is None else (dcp_prefix,)
    matched = _matched(folder, hf, canonical, prefixes, {canonical(name): ref for ref, name in _tied(hf, tied, str)})
    targets: dict[Ref, Spec] = {}
    pieces: dict[Ref, Sequence[Piece]] = {}
    sources, segments = {}, []
    for key, ref in matched:
        described = folder.tensors[key]
        _check_shape(key, described.shape, ref, hf.tensors[ref])
        source = Ref("", "", key)
        spec = whole({source: Spec(described.dtype, described.shape)})[source]
        pieces[source] = [replace(p, sizes=p.sizes or (1,), offsets=p.offsets or (0,)) for p in folder.pieces(key)]
        sources[source] = targets[ref] = spec
        segments.append(Segment(source, 0, ref, 0, spec.shape[0], 0))
    plan = with_sources(Plan.build(sources, targets, segments), pieces)
    files = folder.files(replace(p, sizes=p.place[0].sizes) for held in pieces.values() for p in held)
    stored = {ref: Spec(targets[ref].dtype, spec.shape) for ref, spec in hf.tensors.items()}
    options = {"command": "dcp_to_hf", "layout": "Hugging Face"}
    return Conversion(
        plan=plan,
        source=f"{folder.directory} (DCP)",
        files=files,
        target=huggingface_target(stored, hf, save_hf_dir, options),
        folders=[Path(dcp_dir), folder.directory, Path(hf_dir)],
    )


def distributed_target(
    plan: Plan,
    stored: Mapping[Ref, Stored],
    directory: Path,
    options: Mapping[str, Any],
    *,
    objects: Iterable[str],
    value: bytes,
    paths: Mapping[str, Sequence[str]] | None = None,
    others: Mapping[str, bytes] | None = None,
) -> Target:
    """A distributed checkpoint to write.

    Args:
        plan: what goes where.
        stored: the pieces, by their addresses in the plan.
        directory: the folder above ``release``.
        options: what the user chose.
        objects: keys of what is no tensor.
        value: what they all hold, pickled.
        paths: where each key stands in the nested state dict, for FSDP2's; megatron-core's has none.
        others: further files of ``release``.
    """
    layouts = {
        file: DistcpLayout.of(
            {ref: stored[ref].spec for ref in refs},
            None if number else value,
        )
        for number, (file, refs) in enumerate(plan.files().items())
    }
    release = {".metadata": metadata(stored, layouts, objects=objects, paths=paths), **(others or {})}
    return Target(
        directory=directory,
        layouts=layouts,
        inside="release",
        others={**{f"release/{name}": content for name, content in release.items()}, TRACKER: b"release"},
        options=options,
    )


def check_family(family: Family, hf: HuggingFaceFolder) -> None:
    """Raise ConvertError unless the folder holds just the tensors of its configuration."""
    converter = Converter(family=family)
    converter.plan_hf_to_mm(hf, Layout.undivided(converter.sizes(hf).layers))


def _tied(hf: HuggingFaceFolder, tied: Mapping[str, str] | None, spell: Callable[[str], str]) -> list[tuple[Ref, str]]:
    """Tensors that have a second name, and that name."""
    by_name = {spell(ref.name): ref for ref in hf.tensors}
    if tied is None:
        text = {**hf.config, **(hf.config.get("text_config") or {})}
        asked = bool(hf.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
        found = [name for name in by_name if EMBEDDING.search(name)]
        tied = {OUTPUT: found[0]} if asked and len(found) == 1 else {}
    absent = [source for source in tied.values() if source not in by_name]
    if absent:
        raise CheckpointError(
            f"tied to {listed(absent)}, which the checkpoint does not hold; it has {listed([*by_name])}"
        )
    return [(by_name[source], name) for name, source in tied.items() if name not in by_name]


def _in_memory(name: str) -> str:
    """The name that transformers >= 4.52 holds in memory for a published one of a vision-language model."""
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", name)


def _as_matrix(name: str, shape: Shape) -> Shape:
    return (shape[0] * shape[1], shape[2]) if STACKED.search(name) and len(shape) == 3 else shape


def _matched(
    folder: DistributedFolder,
    hf: HuggingFaceFolder,
    canonical: Callable[[str], str],
    prefixes: Iterable[str],
    tied: Mapping[str, Ref],
) -> list[tuple[str, Ref]]:
    """Every key, and the tensor of the template that it holds; a tied tensor may have two.

    Raises:
        CheckpointError: a tensor has no key, or a key no tensor.
    """
    held = sorted(key for key in folder.tensors if not STATE.match(key))
    wanted = {canonical(ref.name) for ref in hf.tensors}
    # The prefix that explains most of the template.
    under = [
        {canonical(key.removeprefix(ROOT + prefix)): key for key in held if key.startswith(ROOT + prefix)}
        for prefix in prefixes
    ]
    by_name = max(under, key=lambda names: len(wanted & names.keys()))
    matched = [(by_name[name], ref) for ref in hf.tensors if (name := canonical(ref.name)) in by_name]
    matched += [(by_name[name], ref) for name, ref in tied.items() if name in by_name]
    found, used = {ref for _, ref in matched}, {key for key, _ in matched}
    missing = [ref.name for ref in hf.tensors if ref not in found]
    unknown = [key for key in held if key not in used]
    check_total(folder.directory, "the tensors of the Hugging Face folder", missing, unknown)
    return matched


def check_total(directory: Path, what: str, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Raise CheckpointError if something is missing, or left over."""
    missing, unknown = list(missing), list(unknown)
    if missing or unknown:
        words = [f"{directory} does not hold {what}, and those alone;"]
        words += [f"missing {len(missing)}: {listed(missing)};"] if missing else []
        words += [f"unknown {len(unknown)}: {listed(unknown)};"] if unknown else []
        raise CheckpointError(" ".join([*words, "nothing was written"]))


def _check_shape(key: str, shape: Shape, ref: Ref, expected: Spec) -> None:
    if shape not in (expected.shape, _as_matrix(ref.name, expected.shape)):
        raise CheckpointError(
            f"{key} has shape {list(shape)}, but {ref.name} of the Hugging Face folder {list(expected.shape)}"
        )
