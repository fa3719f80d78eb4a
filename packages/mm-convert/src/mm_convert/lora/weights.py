"""Whole weights: put together out of any checkpoint, and made to look like files for those who copy them."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm_convert.copying import read_all, write_all
from mm_convert.in_memory import assemble
from mm_convert.plans import Plan, Ref, Segment
from mm_convert.restricted_pickle import DTYPES
from mm_convert.stored import StoredFile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Tensors that can be read whole, in the names of the Hugging Face side.

    Attributes:
        plan: how they are put together.
        files: the files that this reads.
    """

    plan: Plan
    files: Mapping[str, StoredFile]

    def read(self, ref: Ref) -> Tensor:
        """One of them.

        Raises:
            CheckpointError: copies on several ranks differ, or a file changed.
        """
        first, *others = self.plan.writes[ref]
        whole = self.plan.sources[first.source].shape == self.plan.targets[ref].shape
        if whole and not others and ref not in self.plan.checks:
            return self._load(first.source)  # without the copy that putting together takes
        held: dict[Ref, Tensor] = {}

        def part(segment: Segment) -> Tensor:
            if segment.source not in held:
                held[segment.source] = self._load(segment.source)
            return held[segment.source].narrow(segment.source_dim, segment.source_start, segment.length)

        return assemble(self.plan, ref, part)

    def _load(self, ref: Ref) -> Tensor:
        import torch

        spec, file = self.plan.sources[ref], self.files[ref.file]
        data = torch.empty(spec.shape, dtype=getattr(torch, DTYPES[spec.dtype]))
        with file.opened() as descriptor:
            room = data.view(torch.uint8).numpy().data.cast("B")
            read_all(descriptor, room, file.offsets[ref.section, ref.name])
        return data


class Shelf:
    """The weights that were made last, in temporary files: several ranks take their slices of one, one after another.

    Args:
        places: how many are kept.
    """

    def __init__(self, places: int = 6) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._locks: dict[Ref, threading.Lock] = {}
        self._files: dict[Ref, int] = {}
        weakref.finalize(self, _close, self._files)

    def descriptor(self, ref: Ref, make: Callable[[], Tensor]) -> int:
        """A descriptor of a weight's file, the caller's to close."""
        with self._lock:
            own = self._locks.setdefault(ref, threading.Lock())
        with own:
            with self._lock:
                if ref in self._files:
                    return os.dup(self._files[ref])
            written = _written(make())
            with self._lock:
                self._files[ref] = written
                while len(self._files) > self._places:
                    os.close(self._files.pop(next(iter(self._files))))
                return os.dup(written)


def _close(files: dict[Ref, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)


def _written(tensor: Tensor) -> int:
    """A descriptor of a file without a name, which goes when it is closed."""
    import torch

    with tempfile.TemporaryFile() as file:
        write_all(file.fileno(), tensor.contiguous().view(torch.uint8).numpy().data.cast("B"), 0)
        return os.dup(file.fileno())


@dataclass(frozen=True, kw_only=True)
class MadeFile(StoredFile):
    """One tensor, made when it is read. Path, size and digest are those of a file that it is made from.

    Attributes:
        ref: the tensor.
        make: makes it.
        shelf: where it lies then.
    """

    ref: Ref
    make: Callable[[], Tensor]
    shelf: Shelf

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor to read from."""
        descriptor = self.shelf.descriptor(self.ref, self.make)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def check_unchanged(self) -> None:
        """Nothing to do: the files that it is made from are asked themselves."""
