"""Writing tensors in either format, a tensor at a time: memory does not grow with the size of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from wan_infer.checkpoints.tensors import DTYPES, Tensors, as_bytes, shard_name
from wan_infer.errors import OutputError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the data, as safetensors asks for
Progress = Callable[[int], object]


def size_of(tensors: Tensors) -> int:
    """Return the bytes of all values."""
    return sum(meta.nbytes for meta in tensors.meta.values())


def write_shards(folder: Path, stem: str, tensors: Tensors, shard_size: int, progress: Progress) -> None:
    """Write ``stem.safetensors``, or shards of up to `shard_size` bytes and their index.

    Raises:
        OutputError: the disk is full, or can't be written.
    """
    shards = _share_out(tensors, shard_size)
    files = [shard_name(stem, number, len(shards)) for number in range(len(shards))]
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in zip(files, shards, strict=True):
        write_safetensors(folder / file, tensors, names, progress)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": size_of(tensors)}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Tensors, names: Iterable[str], progress: Progress) -> None:
    """Write one file: the length of the header, the header, the values one after the other.

    Wide dtypes come first, so that every value lies at a multiple of its own size.

    Raises:
        OutputError: the disk is full, or can't be written.
    """
    order = sorted(names, key=lambda name: (-tensors.meta[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        meta = tensors.meta[name]
        header[name] = {
            "dtype": _NAMES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [end, end + meta.nbytes],
        }
        end += meta.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.write(as_bytes(tensors.read(name)))
                progress(tensors.meta[name].nbytes)
    except OSError as error:
        raise OutputError(f"{path} could not be written to its end: {error}") from error


def write_pth(path: Path, tensors: Tensors, progress: Progress) -> None:
    """Write a torch file; values that are memory-mapped go from file to file.

    Raises:
        OutputError: the disk is full, or can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save({name: _alone(tensors.read(name)) for name in tensors.meta}, path)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path} could not be written to its end: {error}") from error
    progress(size_of(tensors))


def _alone(tensor: Tensor) -> Tensor:
    """A tensor with a storage of its own size: torch.save writes whole storages."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _share_out(tensors: Tensors, shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, meta in tensors.meta.items():
        if shards[-1] and filled + meta.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += meta.nbytes
    return shards
