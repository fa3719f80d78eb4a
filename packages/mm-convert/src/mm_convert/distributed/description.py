"""``.metadata`` to write: the pickle of torch's description of a distributed checkpoint.

Written by hand, because the standard pickler wants to import what it names, and torch alone takes ten times the memory
of a conversion. The classes are those of ``torch.distributed.checkpoint.metadata``; their attributes are the state that
pickle stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mm_convert import pickling
from mm_convert.distributed.writing import DistcpLayout, Stored
from mm_convert.plans import Ref
from mm_convert.restricted_pickle import DTYPES
from mm_convert.rules import Shape

MODULE = "torch.distributed.checkpoint.metadata"
STORAGE_MODULE = "torch.distributed.checkpoint.filesystem"
FORMAT = "1.0.0"  # torch's CURRENT_DCP_VERSION
NONE, FALSE = b"N", b"\x89"


def metadata(
    stored: Mapping[Ref, Stored],
    layouts: Mapping[str, DistcpLayout],
    *,
    objects: Iterable[str],
    paths: Mapping[str, Sequence[str]] | None,
) -> bytes:
    """The ``.metadata`` file.

    Args:
        stored: the pieces.
        layouts: the files that hold them.
        objects: the keys of what is no tensor; all have the one value that a file holds.
        paths: where each key stands in the nested state dict; None where there is no nesting.
    """
    by_key: dict[str, list[Stored]] = {}
    storage: list[tuple[bytes, bytes]] = []
    for ref, piece in stored.items():
        held = by_key.setdefault(piece.key, [])
        place = _storage_info(ref.file, *layouts[ref.file].extents[ref])
        storage.append((_index(piece.key, _size(piece.offsets), pickling.integer(len(held))), place))
        held.append(piece)
    described = [(pickling.text(key), _tensor(pieces)) for key, pieces in by_key.items()]
    [(file, extent)] = [(file, layout.value) for file, layout in layouts.items() if layout.value is not None]
    for key in objects:
        described.append((pickling.text(key), _object("BytesStorageMetadata")))
        storage.append((_index(key, NONE, NONE), _storage_info(file, *extent)))
    nested = [] if paths is None else [(pickling.text(key), _texts(path)) for key, path in paths.items()]
    made = _object(
        "Metadata",
        state_dict_metadata=_dict(described),
        planner_data=NONE if paths is None else _dict(nested),
        storage_data=_dict(storage),
        storage_meta=NONE,
        version=pickling.text(FORMAT),
    )
    return b"\x80\x02" + made + b"."


def _tensor(pieces: Sequence[Stored]) -> bytes:
    chunks = [
        _object("ChunkStorageMetadata", offsets=_size(piece.offsets), sizes=_size(piece.spec.shape)) for piece in pieces
    ]
    layout = b"ctorch.serialization\n_get_layout\n(" + pickling.text("torch.strided") + b"tR"
    contiguous = f"c{MODULE}\n_MEM_FORMAT_ENCODING\n".encode() + b"(" + pickling.integer(0) + b"tR"
    dtype = f"ctorch\n{DTYPES[pieces[0].spec.dtype]}\n".encode()
    # This class stores a tuple: dtype, layout, requires_grad, memory format, pin_memory.
    state = b"(" + dtype + layout + FALSE + contiguous + FALSE + b"t"
    properties = f"c{MODULE}\nTensorProperties\n".encode() + b")\x81" + state + b"b"
    return _object(
        "TensorStorageMetadata",
        properties=properties,
        size=_size(pieces[0].whole),
        chunks=b"](" + b"".join(chunks) + b"e",
    )


def _index(key: str, offset: bytes, index: bytes) -> bytes:
    return _object("MetadataIndex", fqn=pickling.text(key), index=index, offset=offset)


def _storage_info(file: str, start: int, length: int) -> bytes:
    span = {"offset": pickling.integer(start), "length": pickling.integer(length)}
    return _object("_StorageInfo", STORAGE_MODULE, relative_path=pickling.text(file), **span)


def _object(name: str, module: str = MODULE, **attributes: bytes) -> bytes:
    """An instance that is made without a call and then given its attributes."""
    made = f"c{module}\n{name}\n".encode() + b")\x81"
    return (
        made + _dict([(pickling.text(key), value) for key, value in attributes.items()]) + b"b" if attributes else made
    )


def _dict(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def _size(shape: Shape) -> bytes:
    return b"ctorch\nSize\n(" + pickling.integers(shape) + b"tR"


def _texts(texts: Iterable[str]) -> bytes:
    return b"(" + b"".join(map(pickling.text, texts)) + b"t"
