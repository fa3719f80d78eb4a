"""Pieces of a pickle of protocol 2, as torch.save writes them.

By hand, because the standard pickler wants to import what it names.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from mm_convert.plans import Spec
from mm_convert.restricted_pickle import STORAGES, UNTYPED


def tensor(key: str, spec: Spec) -> bytes:
    """A call that makes a tensor of the storage `key`."""
    untyped = spec.dtype in UNTYPED
    storage = b"ctorch.storage\nUntypedStorage\n" if untyped else f"ctorch\n{STORAGES.get(spec.dtype)}\n".encode()
    numel = 1
    strides: list[int] = []
    for size in reversed(spec.shape):
        strides.insert(0, numel)
        numel *= size or 1  # as torch counts the strides of empty tensors
    count = spec.nbytes if untyped else (numel if all(spec.shape) else 0)
    persistent = b"(" + text("storage") + storage + text(key) + text("cpu") + integer(count) + b"tQ"
    dtype = f"ctorch\n{UNTYPED[spec.dtype]}\n".encode() if untyped else b""
    function = f"ctorch._utils\n_rebuild_tensor_v{3 if untyped else 2}\n".encode()
    hooks = b"ccollections\nOrderedDict\n)R"
    sizes = integers(spec.shape) + integers(strides)
    return function + b"(" + persistent + b"K\0" + sizes + b"\x89" + hooks + dtype + b"tR"


def integers(numbers: Sequence[int]) -> bytes:
    """A tuple of integers."""
    return b"(" + b"".join(map(integer, numbers)) + b"t"


def text(content: str) -> bytes:
    """A string."""
    encoded = content.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(number: int) -> bytes:
    """An integer of at most 64 bits."""
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data
