"""A checkpoint file as its header describes it: where each tensor's bytes stand, and what the file was then."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mm_convert.errors import CheckpointError
from mm_convert.plans import Spec

Name = tuple[str, str]
"""A tensor's section and name."""


class Descriptor(int):
    """A file descriptor that knows the name of its file, for the words of an error."""

    path: Path

    @classmethod
    def of(cls, path: Path, flags: int) -> Descriptor:
        """Open a file; the caller closes it."""
        descriptor = cls(os.open(path, flags))
        descriptor.path = path
        return descriptor


SAMPLES, SAMPLE = 64, 4096  # how many, and bytes of each


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file that holds tensors as plain little-endian bytes, row by row.

    Attributes:
        path: the file.
        size: its bytes when it was read for the plan.
        mtime_ns: its time of change then.
        header: the range of bytes (start, stop) that describes the rest.
        digest: SHA-256 of that range and of samples of the rest; not of every byte.
        specs: what each tensor is.
        offsets: where each tensor's first byte stands.
    """

    path: Path
    size: int
    mtime_ns: int
    header: tuple[int, int]
    digest: str
    specs: Mapping[Name, Spec]
    offsets: Mapping[Name, int]

    @classmethod
    def described(
        cls, path: Path, header: tuple[int, int], specs: Mapping[Name, Spec], offsets: Mapping[Name, int]
    ) -> StoredFile:
        """Complete what a header says with what the file system and the header's bytes say."""
        stat = path.stat()
        return cls(
            path=path,
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            header=header,
            digest=_digest(path, header),
            specs=specs,
            offsets=offsets,
        )

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor to read from.

        Raises:
            CheckpointError: the file is no longer the one that was planned for.
        """
        descriptor = Descriptor.of(self.path, os.O_RDONLY)
        try:
            stat = os.fstat(descriptor)
            if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
                raise CheckpointError(_changed(self.path))
            yield descriptor
        finally:
            os.close(descriptor)

    def check_unchanged(self) -> None:
        """Compare size, time of change and header with those that the plan was made from.

        Raises:
            CheckpointError: one of them differs.
        """
        with self.opened():
            if _digest(self.path, self.header) != self.digest:
                raise CheckpointError(_changed(self.path))


def _digest(path: Path, header: tuple[int, int]) -> str:
    """SHA-256 of the header and of samples all over the file: two models of the same shapes have the same header."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(header[0])
        digest.update(file.read(header[1] - header[0]))
        size = os.fstat(file.fileno()).st_size
        for number in range(SAMPLES):
            file.seek(size * number // SAMPLES)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _changed(path: Path) -> str:
    return f"{path} changed while it was converted; run the command again when nothing writes to it"
