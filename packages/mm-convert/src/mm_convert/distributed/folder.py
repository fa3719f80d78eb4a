"""A folder of torch.distributed.checkpoint as its metadata and its records' headers describe it.

A ``.distcp`` file holds records one behind the other, each of them what ``torch.save`` makes of one tensor.
"""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

from mm_convert.distributed.metadata import METADATA, Chunk, Described, read_metadata
from mm_convert.distributed.pieces import Piece
from mm_convert.errors import CheckpointError
from mm_convert.megatron import TRACKER, iteration_dir
from mm_convert.plans import BYTES, Ref, Spec
from mm_convert.restricted_pickle import PickledTensor, unpickle
from mm_convert.rules import Shape
from mm_convert.stored import Name, StoredFile
from mm_convert.torch_file import data_offset, records_of


@dataclass(frozen=True, kw_only=True)
class DistributedFolder:
    """A distributed checkpoint.

    Attributes:
        directory: the folder with ``.metadata``.
        tensors: every tensor, by its key.
        objects: the keys of what is no tensor.
    """

    directory: Path
    tensors: dict[str, Described]
    objects: list[str]

    @classmethod
    def open(cls, directory: str | Path) -> DistributedFolder:
        """Read the metadata.

        Args:
            directory: the folder itself, or the one above it, with a tracker file.

        Raises:
            CheckpointError: incomplete or unreadable.
        """
        directory = Path(directory)
        if not (directory / METADATA).is_file() and (directory / TRACKER).is_file():
            directory = iteration_dir(directory)
        tensors, objects, ends = read_metadata(directory)
        absent = sorted({c.file for t in tensors.values() for c in t.chunks if not (directory / c.file).is_file()})
        if absent:
            raise CheckpointError(f"{directory} is incomplete: {METADATA} names {absent[:8]}; copy the whole folder")
        for file in sorted({c.file for t in tensors.values() for c in t.chunks}):
            size = (directory / file).stat().st_size
            if size < ends[file]:
                raise CheckpointError(
                    f"{directory / file} has {size:,} bytes, {METADATA} names {ends[file]:,}: truncated? copy it again"
                )
        return cls(directory=directory, tensors=tensors, objects=objects)

    def piece(self, key: str, chunk: Chunk, leading: Shape = ()) -> Piece:
        """A chunk, or what it holds at a place of the tensor's first dimensions.

        Args:
            key: the tensor.
            chunk: one of its chunks.
            leading: numbers of layer and expert, where layers or experts are stacked into the tensor.
        """
        depth = len(leading)
        skipped = 0
        for place, offset, size in zip(leading, chunk.offsets, chunk.sizes, strict=False):
            skipped = skipped * size + place - offset
        label = "" if len(self.tensors[key].chunks) == 1 and not leading else str([*leading, *chunk.offsets[depth:]])
        sizes = chunk.sizes[depth:]
        start = skipped * prod(sizes) * BYTES[self.tensors[key].dtype]
        return Piece(Ref(chunk.file, label.replace(" ", ""), key), chunk.offsets[depth:], sizes, (chunk, start))

    def pieces(self, key: str, leading: Shape = ()) -> list[Piece]:
        """All pieces of a tensor, or of the one at a place of its first dimensions."""
        return [
            self.piece(key, chunk, leading)
            for chunk in self.tensors[key].chunks
            if all(o <= at < o + n for at, o, n in zip(leading, chunk.offsets, chunk.sizes, strict=False))
        ]

    def files(self, pieces: Iterable[Piece]) -> dict[str, StoredFile]:
        """The files that hold these pieces, and the metadata file, which must not change meanwhile either.

        Raises:
            CheckpointError: a record is damaged, or not what the metadata says.
        """
        by_file: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            by_file[piece.ref.file].append(piece)
        path = self.directory / METADATA
        found = {METADATA: StoredFile.described(path, (0, path.stat().st_size), {}, {})}
        for file, held in sorted(by_file.items()):
            found[file] = self._file(self.directory / file, held)
        return found

    def _file(self, path: Path, pieces: list[Piece]) -> StoredFile:
        specs: dict[Name, Spec] = {}
        offsets: dict[Name, int] = {}
        starts: dict[Chunk, int] = {}
        with path.open("rb") as file:
            for piece in pieces:
                chunk, start = piece.place
                dtype = self.tensors[piece.ref.name].dtype
                if chunk not in starts:
                    starts[chunk] = _first_byte(path, file, piece.ref.name, chunk, dtype)
                name = piece.ref.section, piece.ref.name
                specs[name], offsets[name] = Spec(dtype, piece.sizes), starts[chunk] + start
        return StoredFile.described(path, (0, 0), specs, offsets)


class _View(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.length)[whence]
        if self.position < 0:
            raise OSError("before the record")
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        self.file.seek(self.start + self.position)
        data = self.file.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data


def _first_byte(path: Path, file: IO[bytes], key: str, chunk: Chunk, dtype: str) -> int:
    """Where a record's tensor begins in the file."""
    try:
        with zipfile.ZipFile(_View(file, chunk.start, chunk.length)) as archive:
            records = records_of(archive)
            tensor = unpickle(io.BytesIO(archive.read(records["data.pkl"])))
            if not isinstance(tensor, PickledTensor) or tensor.spec != Spec(dtype, chunk.sizes):
                raise CheckpointError(
                    f"it is not the {dtype} tensor of shape {list(chunk.sizes)} that {METADATA} promises"
                )
            record = records[f"data/{tensor.storage}"]
            start = data_offset(archive, record) + tensor.start
            if not tensor.contiguous or tensor.start + tensor.spec.nbytes > record.file_size:
                raise CheckpointError("its elements don't stand row by row, or are not all there")
    except (CheckpointError, KeyError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError,
            ValueError) as error:  # fmt: skip
        raise CheckpointError(f"{path} can't be read at {key}: {error}; truncated? copy it again") from error
    return chunk.start + start
