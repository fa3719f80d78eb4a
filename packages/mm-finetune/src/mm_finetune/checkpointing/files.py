"""One file a process, in the safetensors format: no pickle, each tensor with a checksum, read piece by piece."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from mm_finetune.errors import CheckpointError

# The format's names of types (huggingface.co/docs/safetensors).
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
NOTES, SUMS = "notes", "crc32"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write tensors of the CPU, and notes that JSON can hold. Without a copy, and mostly without Python's lock.

    Raises:
        OSError: the disk is full, for example.
    """
    views = {name: _bytes(tensor) for name, tensor in tensors.items()}
    sums = {name: crc32(view) for name, view in views.items()}
    header: dict[str, Any] = {"__metadata__": {NOTES: json.dumps(notes), SUMS: json.dumps(sums)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(views[name])
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        for view in (memoryview(len(text).to_bytes(8, "little")), memoryview(text), *views.values()):
            _write_all(file.fileno(), view)
        os.fsync(file.fileno())


class Tensors:
    """A file that :func:`write_tensors` made.

    Raises:
        CheckpointError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
            metadata = self._file.metadata()
            self.notes: dict[str, Any] = json.loads(metadata[NOTES])
            self._sums: dict[str, int] = json.loads(metadata[SUMS])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(str(error)) from error

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, its checksum compared.

        Raises:
            CheckpointError: it is not there, or is not what was written.
        """
        try:
            tensor = cast(Tensor, self._file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise self._damaged(str(error)) from error
        if crc32(_bytes(tensor)) != self._sums.get(name):
            raise self._damaged(f"the checksum of {name} is another one")
        return tensor

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._sums)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged: {why}; remove the folder {self.path.parents[1]} and write the number of an older"
            " checkpoint into latest_checkpointed_iteration.txt beside it"
        )


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1)
    # A single element counts as contiguous with any stride, and then can't be looked at as bytes.
    flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


def _write_all(descriptor: int, view: memoryview) -> None:
    """A single write takes at most 2 GiB."""
    while view:
        view = view[os.write(descriptor, view) :]
