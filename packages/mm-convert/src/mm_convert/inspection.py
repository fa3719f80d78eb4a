"""What a folder is, from names and headers: no tensor is read, nothing is guessed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_convert.distributed.metadata import METADATA
from mm_convert.errors import CheckpointError, ConvertError
from mm_convert.families import CONVERTERS, Family
from mm_convert.families.canonical import as_it_stands
from mm_convert.families.family import ModelSizes
from mm_convert.huggingface import HuggingFaceFolder, model_folder
from mm_convert.journal import MANIFEST, read_manifest
from mm_convert.layout import Layout
from mm_convert.megatron import EXPERT, TRACKER, MegatronFolder
from mm_convert.model_sizes import EMBEDDING, OUTPUT, sizes_on_disk
from mm_convert.plans import Ref, Spec, Specs
from mm_convert.relate import relate
from mm_convert.resplit import paper_tensors

# Folders of other formats, by what stands in them.
OTHERS = {
    "model_index.json": "a diffusers pipeline without a transformer; give one of its folders (vae, …)",
    "adapter_config.json": "a PEFT adapter; lora_hf_to_mm and merge_lora_to_base read it",
}
NO_WORDS = "no embedding of words: not a language model, or a part of one"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of a checkpoint; None is unknown.

    Attributes:
        path: the folder.
        kind: ``huggingface``, ``megatron``, or ``dcp`` or ``torch_dist`` for a distributed checkpoint of an FSDP2
            trainer or of megatron-core.
        converters: published converters whose tables name just these tensors.
        model_type: of ``config.json``, or its ``_class_name``.
        dtypes: number of tensors of each dtype, by safetensors' names.
        tensors: number of tensors, copies on several ranks counted each.
        nbytes: bytes of tensors.
        files: number of files that hold them.
        layout: parallel sizes and layers of each stage, of a Megatron folder.
        iteration: ``release`` or ``iter_…``, of a Megatron folder or a distributed checkpoint.
        tied: whether the output layer is the embedding.
        tied_reason: how that is known, or why not.
        manifest: version and options of the run of mm-convert that made the folder.
    """

    path: str
    kind: str
    converters: tuple[str, ...]
    model_type: str | None
    dtypes: dict[str, int]
    tensors: int
    nbytes: int
    files: int
    layout: Layout | None
    iteration: str | None
    tied: bool | None
    tied_reason: str
    manifest: dict[str, Any] | None


def inspect(path: str | Path) -> Inspection:
    """Say what a folder is.

    Raises:
        CheckpointError: no folder of a known kind, or a damaged one.
        ModelError: ``config.json`` is not readable.
    """
    path = Path(path)
    if is_megatron(path):
        return _megatron(path, MegatronFolder.open(path))
    if any(model_folder(path).glob("*.safetensors")) and (model_folder(path) / "config.json").is_file():
        return _huggingface(path, HuggingFaceFolder.open(path))
    if any((path / METADATA).is_file() for path in (path, *path.glob("*/"))):
        return _distributed(path)
    raise CheckpointError(_what_else(path))


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like a Megatron-style checkpoint."""
    return (path / TRACKER).is_file() and any(path.glob("*/mp_rank_*"))


def converters_of(mm: MegatronFolder) -> tuple[str, ...]:
    """The published converters whose tables name just the tensors of a Megatron folder."""

    def fits(family: Family) -> bool:
        family = as_it_stands(family, names)
        try:
            sizes = sizes_on_disk(family, mm, mm.layout)
            made, _ = relate(family, sizes, mm.layout, paper_tensors(family, sizes, mm))
        except ConvertError:
            return False
        return made.keys() == mm.tensors.keys()

    names = [ref.name for ref in mm.tensors]
    return tuple(name for name, family in CONVERTERS.items() if fits(family))


def converters_for(hf: HuggingFaceFolder) -> tuple[str, ...]:
    """The published converters for a Hugging Face folder's ``config.json``."""
    return tuple(name for name, family in CONVERTERS.items() if family.accepts(hf.config))


def trusted_manifest(path: Path) -> dict[str, Any] | None:
    """A folder's manifest, if no file that it names was touched since it was written."""
    found = read_manifest(path)
    if found is None:
        return None
    # The time of status change cannot be set back: a file put in the place of another has a new one.
    written = (path / MANIFEST).stat().st_mtime_ns
    try:
        for file, entry in found["outputs"].items():
            stat = (path / file).stat()
            if stat.st_size != entry["size"] or max(stat.st_mtime_ns, stat.st_ctime_ns) > written:
                return None
            if not isinstance(entry["crc32"], dict):
                return None
    except (OSError, KeyError, TypeError):
        return None
    return found


def _huggingface(path: Path, hf: HuggingFaceFolder) -> Inspection:
    converters = converters_for(hf)
    sizes = _hf_sizes(hf, converters)
    generative = any(CONVERTERS[name].generative for name in converters)
    heads = [ref for ref in hf.tensors if ref.name.endswith("lm_head.weight")]
    reason = f"config.json, and {'an' if heads else 'no'} lm_head"
    return Inspection(
        path=str(path),
        kind="huggingface",
        converters=converters,
        model_type=hf.config.get("model_type") or hf.config.get("_class_name"),
        **_amounts(hf.tensors),
        files=len(hf.files),
        layout=None,
        iteration=None,
        tied=sizes.tied if sizes and not generative else None,
        tied_reason=NO_WORDS if generative else reason if sizes else "no converter knows this model",
        manifest=_short(read_manifest(path)),
    )


def _hf_sizes(hf: HuggingFaceFolder, converters: Iterable[str]) -> ModelSizes | None:
    return next((CONVERTERS[name].sizes(hf.config) for name in converters), None)


def _megatron(path: Path, mm: MegatronFolder) -> Inspection:
    tied, reason = _tied(mm, trusted_manifest(path))
    converters = converters_of(mm)
    types = {t for name in converters for t in _model_types(CONVERTERS[name], mm)}
    return Inspection(
        path=str(path),
        kind="megatron",
        converters=converters,
        model_type=types.pop() if len(types) == 1 else None,
        **_amounts(mm.tensors),
        files=len(mm.files),
        layout=mm.layout,
        iteration=mm.directory.name,
        tied=tied,
        tied_reason=reason,
        manifest=_short(read_manifest(path)),
    )


def _distributed(path: Path) -> Inspection:
    from mm_convert.distributed.dcp import STATE
    from mm_convert.distributed.folder import DistributedFolder

    folder = DistributedFolder.open(path)
    held = {key: tensor for key, tensor in folder.tensors.items() if not STATE.match(key)}
    return Inspection(
        path=str(path),
        kind="torch_dist" if (folder.directory / "metadata.json").is_file() else "dcp",
        converters=(),
        model_type=None,
        **_amounts({Ref("", "", key): Spec(tensor.dtype, tensor.shape) for key, tensor in held.items()}),
        files=len({chunk.file for tensor in held.values() for chunk in tensor.chunks}),
        layout=None,
        iteration=folder.directory.name,
        tied=None,
        tied_reason="not looked at in a distributed checkpoint",
        manifest=_short(read_manifest(path)),
    )


def _model_types(family: Family, mm: MegatronFolder) -> set[str]:
    """A family's types of models with experts end in ``_moe``, the others do not."""
    experts = any(EXPERT in ref.name for ref in mm.tensors)
    return {name for name in family.model_types if name.endswith("_moe") == experts}


def _tied(mm: MegatronFolder, manifest: dict[str, Any] | None) -> tuple[bool | None, str]:
    embeddings, outputs = (sorted(ref for ref in mm.tensors if ref.name == name) for name in (EMBEDDING, OUTPUT))
    if not embeddings:
        return None, NO_WORDS
    if not outputs:
        return True, "no output layer"
    if mm.layout.pp_size == 1:
        return False, "an output layer on the stage of the embedding"
    crcs = [_crc(manifest, mm, ref) for ref in (*embeddings, *outputs)]
    if None in crcs or len(embeddings) != len(outputs):
        return None, "with pipeline stages there is an output layer either way; `verify` against the model reads it"
    same = crcs[: len(embeddings)] == crcs[len(embeddings) :]
    return same, "checksums of embedding and output layer in the manifest"


def _crc(manifest: dict[str, Any] | None, mm: MegatronFolder, ref: Ref) -> str | None:
    entry = (manifest or {"outputs": {}})["outputs"].get(f"{mm.directory.name}/{ref.file}", {"crc32": {}})
    found = entry["crc32"].get(f"{ref.section}/{ref.name}")
    return found if isinstance(found, str) else None


def _amounts(tensors: Specs) -> dict[str, Any]:
    return {
        "dtypes": dict(Counter(spec.dtype for spec in tensors.values())),
        "tensors": len(tensors),
        "nbytes": sum(spec.nbytes for spec in tensors.values()),
    }


def _short(manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    # The names of tensors that were left over may be many; the manifest itself lists them.
    options = {name: value for name, value in (manifest.get("options") or {}).items() if name != "unused"}
    return {"mm_convert": manifest.get("mm_convert"), "options": options}


def _what_else(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist"
    if not path.is_dir():
        return f"{path} is a file; give the folder of the checkpoint"
    if (path.parent / TRACKER).is_file() and any(path.glob("mp_rank_*")):
        return f"{path} is one iteration of a Megatron checkpoint; give the folder above it, {path.parent}"
    if any(path.glob("*/mp_rank_*")) or any(path.glob("mp_rank_*")):
        return f"{path} has rank folders but no {TRACKER}: an interrupted run? A finished one has it"
    for mark, words in OTHERS.items():
        if (path / mark).exists():
            return f"{path} is {words}"
    if (path / "config.json").is_file():
        return f"{path} has a config.json but no *.safetensors"
    return f"{path} is no checkpoint of a known kind: it has neither config.json nor {TRACKER}"
