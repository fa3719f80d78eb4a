"""Either layout from the other, bit for bit: values and dtypes stay, names and containers change.

A plan is made and checked from headers before a byte is written: every stored tensor is used, every needed one is made,
and what the wanted layout can't say is refused. Then values go from file to file, a tensor at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from tqdm import tqdm

from wan_infer.checkpoints import manifest
from wan_infer.checkpoints.folders import check_free, check_space, new_folder
from wan_infer.checkpoints.layout import CLIP_TEXT_TOWER, CLIP_TOKENIZER, PLACES, STEMS, Part, Source
from wan_infer.checkpoints.loading import Checkpoint, open_checkpoint
from wan_infer.checkpoints.metadata import READERS, Stored
from wan_infer.checkpoints.names import Layout
from wan_infer.checkpoints.parts import open_part
from wan_infer.checkpoints.tensor_writer import Progress, size_of, write_pth, write_safetensors, write_shards
from wan_infer.checkpoints.tensors import Tensors, open_file, read_json, translate
from wan_infer.errors import CheckpointError, RequestError

SHARD_SIZE = 5_000_000_000
_SPARE = 1 << 24  # headers, configurations, indexes

_JSON: Mapping[Part, Callable[[Any], dict[str, Any]]] = MappingProxyType(
    {
        "transformer": lambda config: manifest.transformer_json(config, "diffusers"),
        "vae": manifest.vae_json,
        "text_encoder": manifest.text_encoder_json,
        "clip": manifest.clip_json,
    }
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done.

    Attributes:
        target: the new folder.
        layout: its layout.
        tensors: how many there are in it.
        size: bytes of their values.
        notes: what the user should know about the result.
    """

    target: Path
    layout: Layout
    tensors: int
    size: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Converted:
    """One part in the wanted layout, not written yet; `extra` is the text tower of CLIP."""

    config: Any
    tensors: Tensors
    extra: Tensors | None = None


def convert(
    source: str | Path, target: str | Path, *, to: Layout, overwrite: bool = False, shard_size: int = SHARD_SIZE
) -> Conversion:
    """Write the checkpoint `source` to the folder `target` in the layout `to`.

    Args:
        source: a complete checkpoint in the other layout.
        target: a folder that does not exist yet, or is empty. It appears when it is complete.
        to: "original" or "diffusers".
        overwrite: whether a checkpoint at `target` is replaced.
        shard_size: most bytes of a safetensors file.

    Raises:
        RequestError: `to` is unknown or what `source` has already, or `shard_size` is not positive.
        CheckpointError: the source is incomplete or damaged, or the wanted layout can't express it.
        OutputError: the target is occupied, or the disk is too small.
    """
    source, target = Path(source), Path(target)
    checkpoint = _open(source, to, shard_size)
    check_free(target, overwrite=overwrite, source=source)
    parts = _plans(checkpoint, to)
    stores = [part.tensors for part in parts.values()] + [part.extra for part in parts.values() if part.extra]
    folders = _folders(checkpoint, to)
    size = sum(size_of(tensors) for tensors in stores)
    check_space(target, size + sum(_folder_size(folder) for folder in folders) + _SPARE)
    with new_folder(target) as folder, tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        write = _write_original if to == "original" else _write_diffusers
        write(folder, parts, shard_size, bar.update)
        for origin, place in folders.items():
            shutil.copytree(origin, folder / place, ignore=shutil.ignore_patterns(".*"))
        if to == "diffusers":
            _write_manifest(folder, parts)
    return Conversion(
        target=target,
        layout=to,
        tensors=sum(len(tensors.meta) for tensors in stores),
        size=size,
        notes=_notes(parts, to),
    )


def _open(source: Path, to: Layout, shard_size: int) -> Checkpoint:
    if to not in get_args(Layout):
        raise RequestError(f"the layout {to!r} is unknown; choose from {', '.join(get_args(Layout))}")
    if shard_size <= 0:
        raise RequestError(f"a shard of {shard_size} bytes was asked for; give a positive number")
    checkpoint = open_checkpoint(source)
    if checkpoint.layout == to:
        raise RequestError(f"{source} has the {to} layout already")
    return checkpoint


def _plans(checkpoint: Checkpoint, to: Layout) -> dict[Part, _Converted]:
    return {part: _plan(checkpoint.source(part), to) for part in checkpoint.parts if part != "tokenizer"}


def _plan(source: Source, to: Layout) -> _Converted:
    blank, tensors = open_part(source)
    converted = translate(tensors, blank.names, to)
    if to == "original":
        _check_expressible(source, blank.config, converted)
    return _Converted(config=blank.config, tensors=converted, extra=_text_tower(source))


def _check_expressible(source: Source, config: Any, converted: Tensors) -> None:
    """Read the configuration again, as it will be read from the original layout, and compare."""
    stored = manifest.transformer_json(config, "original") if source.part == "transformer" else {}
    again = asdict(READERS[source.part](Stored(source.path, "original", stored, converted.meta)))
    lost = [
        f"{key} would become {again[key]!r}, is {value!r}"
        for key, value in asdict(config).items()
        if value != again[key]
    ]
    if lost:
        raise CheckpointError(
            f"the original layout can't express the {source.part} of {source.path}: {'; '.join(lost)}"
        )


def _text_tower(source: Source) -> Tensors | None:
    if source.part != "clip":
        return None
    if source.layout == "original":
        tower = open_file(source.path).only(lambda name: not name.startswith("visual."))
        return tower if tower.meta else None
    file = source.path / CLIP_TEXT_TOWER
    return open_file(file) if file.is_file() else None


def _folders(checkpoint: Checkpoint, to: Layout) -> dict[Path, str]:
    """Folders that are copied, and where to."""
    folders = {checkpoint.source("tokenizer").path: PLACES[to]["tokenizer"]}
    clip_tokenizer = checkpoint.path / CLIP_TOKENIZER[checkpoint.layout]
    if "clip" in checkpoint.parts and clip_tokenizer.is_dir():
        folders[clip_tokenizer] = CLIP_TOKENIZER[to]
    return folders


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_original(folder: Path, parts: Mapping[Part, _Converted], shard_size: int, progress: Progress) -> None:
    for part, converted in parts.items():
        if part == "transformer":
            manifest.write_json(folder / "config.json", manifest.transformer_json(converted.config, "original"))
            write_shards(folder, STEMS[part], converted.tensors, shard_size, progress)
        else:
            write_pth(folder / PLACES["original"][part], _united(converted), progress)


def _united(converted: _Converted) -> Tensors:
    tensors, extra = converted.tensors, converted.extra
    if extra is None:
        return tensors
    meta = {**tensors.meta, **extra.meta}
    return replace(tensors, meta=meta, read=lambda name: (tensors if name in tensors.meta else extra).read(name))


def _write_diffusers(folder: Path, parts: Mapping[Part, _Converted], shard_size: int, progress: Progress) -> None:
    for part, converted in parts.items():
        place = folder / PLACES["diffusers"][part]
        manifest.write_json(place / "config.json", _JSON[part](converted.config))
        write_shards(place, STEMS[part], converted.tensors, shard_size, progress)
        if converted.extra is not None:
            write_safetensors(place / CLIP_TEXT_TOWER, converted.extra, converted.extra.meta, progress)


def _write_manifest(folder: Path, parts: Mapping[Part, _Converted]) -> None:
    clip = parts["clip"].config if "clip" in parts else None
    about = folder / "tokenizer" / "tokenizer_config.json"
    tokenizer = (
        str(read_json(about).get("tokenizer_class", "T5TokenizerFast")) if about.is_file() else "T5TokenizerFast"
    )
    index = manifest.model_index(parts["transformer"].config, clip, tokenizer)
    manifest.write_json(folder / "model_index.json", index)
    manifest.write_json(folder / "scheduler" / "scheduler_config.json", manifest.SCHEDULER)
    if clip is not None:
        processor = folder / "image_processor" / "preprocessor_config.json"
        manifest.write_json(processor, manifest.image_processor_json(clip))


def _notes(parts: Mapping[Part, _Converted], to: Layout) -> tuple[str, ...]:
    if to == "original" and "clip" in parts and parts["clip"].extra is None:
        return ("the source has no text tower of CLIP: wan-infer does not use it, the original code asks for it",)
    return ()
