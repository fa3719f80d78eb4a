"""A ``.pt`` file of torch.save (a zip with one stored record a tensor), described without loading it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mm_convert.errors import CheckpointError
from mm_convert.plans import Spec
from mm_convert.restricted_pickle import PickledTensor, unpickle
from mm_convert.stored import Name, StoredFile

LARGEST_PICKLE = 256 << 20  # names and shapes of some million tensors
Sections = Callable[[Any], Mapping[str, Mapping[Any, Any]]]
LOCAL_HEADER = 30  # bytes before the record's name; the lengths of name and extra field are its last two numbers


def read_torch_file(path: Path) -> tuple[StoredFile, list[str]]:
    """The tensors of a rank's file, and its sections (``model``, or ``model0``, ``model1``, …).

    Entries beside the sections, entries that are no tensors, and ``_extra_state`` are left out.

    Raises:
        CheckpointError: not of torch.save, truncated, or its pickle asks to run code.
    """
    return _read(path, _sections)


def read_weights_file(path: Path) -> StoredFile:
    """The tensors of a ``.pt`` file of an original release: ``{name: tensor}``, by itself or in a ``module`` entry.

    Raises:
        CheckpointError: not of torch.save, truncated, or its pickle asks to run code.
    """
    return _read(path, _bare)[0]


def _read(path: Path, sections: Sections) -> tuple[StoredFile, list[str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            records = records_of(archive)
            if records["data.pkl"].file_size > LARGEST_PICKLE:
                raise CheckpointError(f"its pickle is larger than {LARGEST_PICKLE >> 20} MiB; save the tensors alone")
            content = unpickle(io.BytesIO(archive.read(records["data.pkl"])))
            header = (archive.start_dir, path.stat().st_size)
            tensors = _tensors(sections(content))
            used = {t.storage: records[f"data/{t.storage}"] for t in tensors.values()}
            starts = {key: data_offset(archive, record) for key, record in used.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be read as a checkpoint: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} can't be read as a checkpoint: it has no record {error}") from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{path} can't be read as a checkpoint: {error}; if it is not damaged but in torch's old format (before"
            " 1.6), load it and save it again with torch.save"
        ) from error
    for (_, name), tensor in tensors.items():
        _check_tensor(path, name, tensor, used[tensor.storage].file_size, starts[tensor.storage], header[0])
    offsets = {name: starts[t.storage] + t.start for name, t in tensors.items()}
    specs: dict[Name, Spec] = {name: t.spec for name, t in tensors.items()}
    return StoredFile.described(path, header, specs, offsets), list(sections(content))


def records_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Records by name without the leading folder, which differs from file to file."""
    records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    packed = [name for name, info in records.items() if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(f"record {packed[0]} is compressed, which torch.save never does; unpack and store it")
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise CheckpointError("its numbers are big endian; save it again on a little-endian machine")
    return records


def data_offset(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """Where a record's first byte stands.

    Raises:
        CheckpointError: the directory of the zip leads nowhere.
    """
    file = archive.fp
    if file is None:
        raise ValueError("the archive is closed")
    file.seek(record.header_offset)
    header = file.read(LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04" or len(header) != LOCAL_HEADER:
        raise CheckpointError(f"record {record.filename} does not stand where the directory says")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return record.header_offset + LOCAL_HEADER + name + extra


def _sections(content: Any) -> dict[str, Mapping[Any, Any]]:
    found = content.items() if isinstance(content, Mapping) else ()
    sections = {
        key: value
        for key, value in found
        if isinstance(key, str)
        and key.startswith("model")
        and (key == "model" or key[5:].isdecimal())
        and isinstance(value, Mapping)
    }
    if not sections:
        raise CheckpointError("it has no entry 'model'; is it a Megatron checkpoint?")
    return sections


def _bare(content: Any) -> dict[str, Mapping[Any, Any]]:
    """The dict of tensors under the empty name."""
    found = content if isinstance(content, Mapping) else {}
    inside = next((found[key] for key in ("module", "state_dict") if isinstance(found.get(key), Mapping)), found)
    if not any(isinstance(value, PickledTensor) for value in inside.values()):
        raise CheckpointError("it holds no tensors by name, neither by themselves nor under 'module' or 'state_dict'")
    return {"": inside}


def _tensors(sections: Mapping[str, Mapping[Any, Any]]) -> dict[Name, PickledTensor]:
    return {
        (section, str(name)): tensor
        for section, held in sections.items()
        for name, tensor in held.items()
        if isinstance(tensor, PickledTensor) and not str(name).endswith("_extra_state")
    }


def _check_tensor(path: Path, name: str, tensor: PickledTensor, held: int, start: int, end: int) -> None:
    if not tensor.contiguous:
        raise CheckpointError(
            f"{path}: {name} is not contiguous (a transposed or strided view was saved); save it with .contiguous()"
        )
    if tensor.start + tensor.spec.nbytes > held or start + held > end:
        raise CheckpointError(f"{path}: the bytes of {name} are not all there; truncated? copy it again")
