"""The safetensors format: 8 bytes of header length (little endian), a JSON header, the tensors' bytes.

Published at https://huggingface.co/docs/safetensors: offsets count from the end of the header, tensors
leave no gap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_convert.errors import CheckpointError
from mm_convert.plans import BYTES, Ref, Spec
from mm_convert.stacked import offsets_of_parts, stacked
from mm_convert.stored import StoredFile

LARGEST_HEADER = 100 << 20  # safetensors' own limit
# The library sorts by dtype (largest alignment first), then by name; the same order gives the same bytes.
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")


def read_safetensors(path: Path) -> StoredFile:
    """The header of a safetensors file.

    Raises:
        CheckpointError: the file is not safetensors, truncated, or its header contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise CheckpointError(f"{path} is not a safetensors file, or it is truncated")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {name: (_spec(name, entry), *_pair(entry["data_offsets"])) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} has no valid safetensors header: {error}") from error
    strange = {spec.dtype for spec, *_ in found.values()} - BYTES.keys()
    if strange:
        raise CheckpointError(f"{path} holds tensors of dtype {sorted(strange)}; known: {', '.join(BYTES)}")
    end = _check_offsets(path, found)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header asks for {8 + length + end}: truncated? copy it again"
        )
    return StoredFile.described(
        path,
        (0, 8 + length),
        {("", name): spec for name, (spec, *_) in found.items()},
        {("", name): 8 + length + begin for name, (_, begin, _) in found.items()},
    )


@dataclass(frozen=True, kw_only=True)
class SafetensorsLayout:
    """A safetensors file to write: where everything will stand, known before a byte is there.

    Attributes:
        size: bytes of the whole file.
        offsets: where each tensor's first byte goes.
        header: the bytes before the first tensor.
    """

    size: int
    offsets: Mapping[Ref, int]
    header: bytes

    @classmethod
    def of(cls, tensors: Mapping[Ref, Spec]) -> SafetensorsLayout:
        """Lay out a file of these tensors, in the order in which the safetensors library puts them.

        Args:
            tensors: the tensors; experts' parts of one stand in it one over another (see :mod:`mm_convert.stacked`).
        """
        parts, tensors = tensors, stacked(tensors)
        ordered = sorted(tensors, key=lambda ref: (ORDER.index(tensors[ref].dtype), ref.name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begins: dict[Ref, int] = {}
        position = 0
        for ref in ordered:
            spec, begins[ref] = tensors[ref], position
            position += spec.nbytes
            entries[ref.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [begins[ref], position],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offsets = {ref: len(header) + begin for ref, begin in begins.items()}
        return cls(size=len(header) + position, offsets=offsets_of_parts(offsets, parts), header=header)

    def frame(self, crcs: Mapping[Ref, int]) -> Iterator[tuple[int, bytes]]:
        """What is no tensor: (offset, bytes)."""
        yield 0, self.header


def _spec(name: str, entry: Mapping[str, Any]) -> Spec:
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has shape {shape!r}")
    return Spec(str(entry["dtype"]), tuple(shape))


def _pair(offsets: Any) -> tuple[int, int]:
    begin, end = offsets
    if type(begin) is not int or type(end) is not int:
        raise ValueError(f"data_offsets {offsets!r} are no whole numbers")
    return begin, end


def _check_offsets(path: Path, found: Mapping[str, tuple[Spec, int, int]]) -> int:
    """The end of the last tensor; each must be as long as its shape says and begin where another ended."""
    position = 0
    for name, (spec, begin, end) in sorted(found.items(), key=lambda item: item[1][1:]):
        if begin != position or end - begin != spec.nbytes:
            raise CheckpointError(
                f"{path}: the header puts {name} ({spec.dtype} {list(spec.shape)}, {spec.nbytes} bytes) at bytes"
                f" {begin} to {end}, expected from {position} on; the file is damaged, copy it again"
            )
        position = end
    return position
