"""Tensors in files: their names and shapes from the headers, their values by memory map, one at a time.

Nothing is unpickled but tensors (``weights_only``), and no value is read before its shape was looked at.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_infer.checkpoints.names import Layout, NameMap
from wan_infer.errors import CheckpointError

DTYPES = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_SHOWN = 20  # names in a message
_SAMPLE = 1024  # elements at either end of a tensor that `fingerprint` reads


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Named tensors that are read when asked for.

    Attributes:
        place: the file or folder, for messages.
        meta: every tensor on the meta device: shape and dtype without values.
        read: returns the value of a name, memory-mapped on the CPU where the file allows it.
    """

    place: Path
    meta: Mapping[str, Tensor]
    read: Callable[[str], Tensor]

    def only(self, keep: Callable[[str], bool]) -> Tensors:
        """Return those whose name `keep` accepts."""
        meta = {name: tensor for name, tensor in self.meta.items() if keep(name)}
        return Tensors(place=self.place, meta=meta, read=self.read)

    def renamed(self, new_names: Mapping[str, str]) -> Tensors:
        """Return the same with some names replaced, by old name."""
        old_names = {new: old for old, new in new_names.items()}
        meta = {new_names.get(name, name): tensor for name, tensor in self.meta.items()}
        return Tensors(place=self.place, meta=meta, read=lambda name: self.read(old_names.get(name, name)))


def open_safetensors(folder: Path, stem: str) -> Tensors:
    """Open ``stem.safetensors`` of a folder, or its shards.

    Raises:
        CheckpointError: a file is missing or damaged, or the index and the shards disagree.
    """
    weight_map = _weight_map(folder, stem)
    tensors = _merge(folder, safetensors_files(folder, stem))
    lost = [name for name in weight_map if name not in tensors.meta]
    complain(folder, [f"missing {name}, which the index says is in {weight_map[name]}" for name in lost])
    return tensors


def safetensors_files(folder: Path, stem: str) -> list[Path]:
    """Return the weight files that a folder should have: one, or the shards that the index or their numbers tell.

    Raises:
        CheckpointError: the index can't be read.
    """
    if weight_map := _weight_map(folder, stem):
        return [folder / file for file in sorted(set(weight_map.values()))]
    single = folder / f"{stem}.safetensors"
    numbered = re.compile(re.escape(stem) + r"-\d{5}-of-(\d{5})\.safetensors")
    totals = {int(found[1]) for path in folder.glob("*.safetensors") if (found := numbered.fullmatch(path.name))}
    if single.is_file() or not totals:
        return [single]
    return [folder / shard_name(stem, n, max(totals)) for n in range(max(totals))]


def shard_name(stem: str, number: int, total: int) -> str:
    """Return the name of shard `number`, counted from 0."""
    return f"{stem}.safetensors" if total == 1 else f"{stem}-{number + 1:05}-of-{total:05}.safetensors"


def open_file(path: Path) -> Tensors:
    """Open a ``.pth`` or ``.safetensors`` file.

    Raises:
        CheckpointError: it is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.suffix == ".safetensors":
        return _merge(path, [path])
    tensors = _load_pickle(path)
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return Tensors(place=path, meta=meta, read=tensors.__getitem__)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is missing, or no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not an object")
    return value


def translate(tensors: Tensors, names: NameMap, to: Layout) -> Tensors:
    """Return the same tensors as they are in the layout `to`; their shapes must have been checked.

    Raises:
        CheckpointError: a name that no rule knows, or only some parts of a tensor that is joined.
    """
    steps, unknown = names.steps(tensors.meta, to)
    missing = [source for step in steps for source in step.sources if source not in tensors.meta]
    complain(tensors.place, [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unknown])
    by_target = {step.target: step for step in steps}

    def read(name: str) -> Tensor:
        step = by_target[name]
        return step.apply([tensors.read(source) for source in step.sources])

    meta = {step.target: step.apply([tensors.meta[source] for source in step.sources]) for step in steps}
    return Tensors(place=tensors.place, meta=meta, read=read)


def check(tensors: Tensors, expected: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes with what a model needs, before a value is read.

    Args:
        tensors: what is stored.
        expected: what is needed, by the names of the same layout.

    Raises:
        CheckpointError: names every tensor that is missing, unexpected, of another shape or not floating point.
    """
    found = tensors.meta
    faults = [f"missing {name} {list(expected[name].shape)}" for name in expected if name not in found]
    for name in (name for name in expected if name in found):
        if found[name].shape != expected[name].shape:
            faults.append(f"{name} is {list(found[name].shape)}, should be {list(expected[name].shape)}")
        elif not found[name].is_floating_point():
            faults.append(f"{name} is {found[name].dtype}, should be a floating point type")
    faults += [f"unexpected {name} {list(found[name].shape)}" for name in found if name not in expected]
    complain(tensors.place, faults)


def fingerprint(tensors: Tensors) -> str:
    """Return a SHA-256 that changes when the tensors do, from a small part of their bytes.

    It covers every name, shape and dtype, and the first and last 1024 elements of every tensor: a model that was
    trained further, converted to another dtype or replaced is another one. A change confined to the middle of large
    tensors is not seen. File names, shards and layout have no influence.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors.meta):
        value = tensors.read(name).reshape(-1)
        digest.update(f"{name} {list(tensors.meta[name].shape)} {value.dtype}\n".encode())
        for end in (value[:_SAMPLE], value[-_SAMPLE:]):
            digest.update(as_bytes(end))
    return digest.hexdigest()


def complain(place: Path, faults: list[str]) -> None:
    """Raise one error for all faults, shortened when they are many; nothing without a fault.

    Raises:
        CheckpointError: there are faults.
    """
    if not faults:
        return
    more = f"\n  … and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    lines = "".join(f"\n  {fault}" for fault in faults[:_SHOWN])
    raise CheckpointError(f"{place} does not fit the model ({len(faults)} faults):{lines}{more}")


def as_bytes(tensor: Tensor) -> memoryview:
    """View the bytes of a CPU tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _weight_map(folder: Path, stem: str) -> dict[str, str]:
    """Which file holds which tensor, empty without an index."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    strange = sorted(
        {str(file) for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file}
    )
    if strange:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(strange)}")
    return weight_map


def _merge(place: Path, files: list[Path]) -> Tensors:
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"{place} lacks {', '.join(missing)}; copy the whole checkpoint")
    meta: dict[str, Tensor] = {}
    handles: dict[str, Any] = {}
    for path in files:
        handle, found = _open_one(path)
        twice = sorted(meta.keys() & found.keys())
        complain(place, [f"{name} is stored twice, the second time in {path.name}" for name in twice])
        meta.update(found)
        handles.update(dict.fromkeys(found, handle))
    return Tensors(place=place, meta=meta, read=lambda name: handles[name].get_tensor(name))


def _open_one(path: Path) -> tuple[Any, dict[str, Tensor]]:
    try:
        handle: Any = safe_open(path, "pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or truncated ({error}); copy it again") from error
    strange = [
        f"{name} has the dtype {part.get_dtype()}" for name, part in slices.items() if part.get_dtype() not in DTYPES
    ]
    complain(path, strange)
    meta = {
        name: torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
        for name, part in slices.items()
    }
    return handle, meta


def _load_pickle(path: Path) -> dict[str, Tensor]:
    mapped = zipfile.is_zipfile(path)  # torch's older format can't be mapped
    try:
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects beside tensors; those could run code, so it is not loaded"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a torch file, or truncated ({reason}); copy it again") from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__}, not tensors by name")
    complain(
        path,
        [
            f"{name!r} is no dense tensor of a usual dtype"
            for name, value in content.items()
            if not isinstance(name, str) or not _is_usual(value)
        ],
    )
    return {name: value.detach() for name, value in content.items()}


def _is_usual(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in DTYPES.values()
