"""The pickle inside a torch file, read without executing anything.

A pickle can name any callable of the machine and have it called. Here a name is looked up in the table of this
file and nowhere else: tensors become descriptions of where their bytes stand, a trainer's options become empty
objects, and any other name ends the reading.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import IO, Any

from mm_convert.errors import CheckpointError
from mm_convert.plans import BYTES, Spec

STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
# Younger dtypes have no storage class: torch saves raw bytes, and the dtype beside them.
UNTYPED = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
DTYPES = {
    **UNTYPED,
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# What a trainer saves beside the weights: options, random states. Read as objects with nothing inside.
INERT = frozenset(
    {
        "argparse.Namespace",
        "_codecs.encode",
        "_io.BytesIO",
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        "pathlib.PosixPath",
        "torch.device",
        "torch.Size",
    }
)
INERT_MODULES = ("megatron.", "mindspeed.", "mindspeed_mm.")  # enums and configurations among a trainer's options


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of the pickle.

    Attributes:
        spec: dtype and shape.
        storage: name of the record that holds its bytes.
        start: the tensor's first byte in that record.
        contiguous: whether its elements stand row by row without gaps.
    """

    spec: Spec
    storage: str
    start: int
    contiguous: bool


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str | None


@dataclass(frozen=True)
class _Dtype:
    name: str


@dataclass(frozen=True)
class _StorageType:
    dtype: str | None


class _Inert:
    """Takes any arguments and any state, keeps none."""

    __slots__ = ()

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class _Rebuild:
    """Stands where torch's function would: a call gives a description."""

    name: str

    def __call__(self, *args: Any) -> object:
        if self.name == "_rebuild_parameter":
            return args[0]
        storage, start, shape, stride = args[:4]
        dtype = args[6].name if self.name == "_rebuild_tensor_v3" else storage.dtype
        numbers = (start, *shape, *stride)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(stride):
            raise pickle.UnpicklingError(f"a tensor of shape {shape!r} and strides {stride!r}")
        spec = Spec(dtype, tuple(shape))
        return PickledTensor(spec, storage.key, start * BYTES[dtype], _contiguous(spec, stride))


def _globals() -> dict[str, Any]:
    rebuild = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
    return {
        "collections.OrderedDict": OrderedDict,
        "torch.storage.UntypedStorage": _StorageType(None),
        **{f"torch.{name}": _StorageType(dtype) for dtype, name in STORAGES.items()},
        **{f"torch.{name}": _Dtype(dtype) for dtype, name in DTYPES.items()},
        **{f"torch._utils.{name}": _Rebuild(name) for name in rebuild},
        **dict.fromkeys(INERT, _Inert),
    }


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        # Of its own: a pickle can change the attributes of what it is given, and must not reach the next file.
        self.table = _globals()

    def find_class(self, module: str, name: str) -> Any:
        """Only what the table names; nothing is imported."""
        if module.startswith(INERT_MODULES):
            return _Inert
        if f"{module}.{name}" not in self.table:
            raise CheckpointError(
                f"it wants {module}.{name}, which no checkpoint needs; nothing was executed. If you trust the file,"
                " save its tensors alone with torch.save, or as safetensors"
            )
        return self.table[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: where it stands, not its bytes."""
        kind, storage_type, key, *_ = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"a reference of kind {kind!r}")
        return _Storage(key, storage_type.dtype)


def unpickle(file: IO[bytes]) -> Any:
    """Read a torch file's pickle.

    Returns:
        Its content, with :class:`PickledTensor` in the place of tensors.

    Raises:
        CheckpointError: it names something that no checkpoint needs, or it is damaged.
    """
    try:
        return _Unpickler(file).load()
    except CheckpointError:
        raise
    # What the standard library raises on damaged pickles is "not limited to" a list: these are the kinds seen.
    except (pickle.UnpicklingError, EOFError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError,
            RecursionError, TypeError, ValueError) as error:  # fmt: skip
        raise CheckpointError(f"its pickle is damaged: {error!r}") from error


def _contiguous(spec: Spec, stride: tuple[int, ...]) -> bool:
    """Row-major order; a dimension of one element may have any stride, and so may all when there is no element."""
    return not prod(spec.shape) or all(
        size == 1 or step == prod(spec.shape[dim + 1 :])
        for dim, (size, step) in enumerate(zip(spec.shape, stride, strict=True))
    )
