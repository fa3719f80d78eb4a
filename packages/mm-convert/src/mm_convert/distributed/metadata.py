"""``.metadata`` of torch.distributed.checkpoint, read without executing anything.

It is a pickle of torch's own description (``torch.distributed.checkpoint.metadata``). Here its classes become records
with no behaviour, and any name beside them ends the reading.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from mm_convert.errors import CheckpointError
from mm_convert.restricted_pickle import DTYPES
from mm_convert.rules import Shape

METADATA = ".metadata"
LARGEST = 1 << 30  # some million pieces
TORCH = "torch.distributed.checkpoint."
# What stands beside the description: plans that megatron-core caches, the folder's name when it was written.
INERT = frozenset({"pathlib.PosixPath", "pathlib._local.PosixPath", "torch.serialization._get_layout"})
INERT_MODULES = (TORCH, "megatron.core.dist_checkpointing.")


@dataclass(frozen=True)
class Chunk:
    """A stored piece of a tensor.

    Attributes:
        file: the file's name in the folder.
        start: first byte of its record there.
        length: bytes of the record.
        offsets: where the piece begins in the tensor.
        sizes: its shape.
    """

    file: str
    start: int
    length: int
    offsets: Shape
    sizes: Shape


@dataclass(frozen=True)
class Described:
    """A tensor as the metadata describes it: safetensors' dtype name, shape, pieces."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


class _Record:
    """Stands in the place of any class: keeps what it is given, does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.fields: dict[str, Any] = {}

    def __new__(cls, *args: object, **kwargs: object) -> _Record:
        made = super().__new__(cls)
        made.fields = {}
        return made

    def __setstate__(self, state: object) -> None:
        self.fields = dict(state) if isinstance(state, dict) else {"state": state}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        # Classes of its own: a pickle must not reach the next file through them.
        kinds = {"Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                 "TensorProperties"}  # fmt: skip
        self.inert = type("Inert", (_Record,), {})
        self.table: dict[str, Any] = {f"{TORCH}metadata.{name}": type(name, (_Record,), {}) for name in kinds}
        self.table[f"{TORCH}filesystem._StorageInfo"] = type("_StorageInfo", (_Record,), {})
        self.table |= {f"torch.{name}": dtype for dtype, name in DTYPES.items()}
        self.table |= {"torch.Size": tuple, "collections.OrderedDict": OrderedDict}

    def find_class(self, module: str, name: str) -> Any:
        """Only what the table names; nothing is imported."""
        full = f"{module}.{name}"
        if full in self.table:
            return self.table[full]
        if full in INERT or module.startswith(INERT_MODULES):
            return self.inert
        raise CheckpointError(
            f"it wants {full}, which no checkpoint needs; nothing was executed. If you trust the file, load it with"
            " torch.distributed.checkpoint and save it again"
        )


def read_metadata(directory: Path) -> tuple[dict[str, Described], list[str], dict[str, int]]:
    """The tensors of a folder, the keys of what is no tensor, and how many bytes each file has at least.

    Raises:
        CheckpointError: no such folder, a damaged description, or one that asks to run code.
    """
    path = directory / METADATA
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is no distributed checkpoint: it has no {METADATA} (an unfinished one has none)"
        )
    if path.stat().st_size > LARGEST:
        raise CheckpointError(f"{path} is larger than {LARGEST >> 20} MiB")
    try:
        with path.open("rb") as file:
            return _described(_Unpickler(file).load())
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    # What the standard library raises on damaged pickles is "not limited to" a list: these are the kinds seen.
    except (pickle.UnpicklingError, EOFError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError,
            RecursionError, TypeError, ValueError) as error:  # fmt: skip
        raise CheckpointError(f"{path} can't be read: {error!r}; is it damaged?") from error


def _described(content: Any) -> tuple[dict[str, Described], list[str], dict[str, int]]:
    stored: dict[tuple[str, Shape], Any] = {}
    ends: dict[str, int] = {}
    for index, info in content.fields["storage_data"].items():
        at = index.fields["fqn"], tuple(index.fields.get("offset") or ())
        stored[at] = info.fields
        file, (start, length) = info.fields["relative_path"], _shape((info.fields["offset"], info.fields["length"]))
        ends[file] = max(ends.get(file, 0), start + length)
    tensors: dict[str, Described] = {}
    objects: list[str] = []
    for key, value in content.fields["state_dict_metadata"].items():
        if not isinstance(key, str):
            raise ValueError(f"a key {key!r}")
        if "size" in value.fields:
            tensors[key] = _tensor(key, value.fields, stored)
        else:
            objects.append(key)
    return tensors, objects, ends


def _tensor(key: str, fields: Mapping[str, Any], stored: Mapping[tuple[str, Shape], Any]) -> Described:
    dtype = fields["properties"].fields["state"][0]
    if dtype not in DTYPES:
        raise CheckpointError(f"{key} has dtype {dtype!r}; known: {', '.join(DTYPES)}")
    shape = _shape(fields["size"])
    chunks: list[Chunk] = []
    for chunk in fields["chunks"]:
        offsets, sizes = _shape(chunk.fields["offsets"]), _shape(chunk.fields["sizes"])
        info = stored[key, offsets]
        if info.get("transform_descriptors"):
            raise CheckpointError(f"{key} is stored transformed ({info['transform_descriptors']}); save it without")
        file, start, length = info["relative_path"], info["offset"], info["length"]
        if not isinstance(file, str) or Path(file).name != file or file.startswith("."):
            raise CheckpointError(f"{key} stands in {file!r}, which is no file of the folder")
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"{key} of shape {shape} has a piece {sizes} at {offsets}")
        chunks.append(Chunk(file, start, length, offsets, sizes))
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
        raise CheckpointError(f"{key} of shape {list(shape)} is not all there: is a rank's part of the folder missing?")
    return Described(dtype, shape, tuple(sorted(chunks, key=lambda chunk: chunk.offsets)))


def _shape(numbers: Any) -> Shape:
    shape = tuple(numbers)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"sizes {numbers!r}")
    return shape
