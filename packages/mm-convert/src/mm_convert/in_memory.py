"""Plans carried out on torch tensors, for whoever holds a model in memory rather than on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from mm_convert.errors import CheckpointError, unequal
from mm_convert.huggingface import HuggingFaceFolder
from mm_convert.megatron import MegatronFolder, load_rank_file
from mm_convert.plans import ZEROS, Plan, Ref, Segment
from mm_convert.restricted_pickle import DTYPES
from mm_convert.stacked import number, whole

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[Segment], "Tensor"]
"""Gives a segment's slice of its source."""


def assemble(plan: Plan, target: Ref, read: Read) -> Tensor:
    """Make one target tensor.

    Raises:
        CheckpointError: a second source of the same bytes differs (see :mod:`mm_convert.plans`).
    """
    import torch

    segments = plan.writes[target]

    def part(segment: Segment) -> Tensor:
        if segment.source.section == ZEROS:
            spec = plan.targets[target]
            shape = [*spec.shape[: segment.dim], segment.length, *spec.shape[segment.dim + 1 :]]
            return torch.zeros(shape, dtype=getattr(torch, DTYPES[spec.dtype]))
        return read(segment).T if segment.transposed else read(segment)

    slices = [part(segment) for segment in segments]
    tensor = torch.cat(slices, dim=segments[0].dim) if len(slices) > 1 else slices[0].clone().contiguous()
    for segment in plan.checks.get(target, ()):
        written = tensor.narrow(segment.dim, segment.target_start, segment.length)
        # As bytes: a NaN equals itself here.
        if not torch.equal(*(t.contiguous().view(torch.uint8) for t in (written, part(segment)))):
            raise CheckpointError(unequal(segment.source, segments[0].source, target))
    return tensor


@contextmanager
def huggingface_reader(source: HuggingFaceFolder) -> Iterator[Read]:
    """Slices of a Hugging Face folder's tensors, straight from the files."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(source.directory / file, framework="pt"))
            for file in {ref.file for ref in source.tensors}
        }

        def read(segment: Segment) -> Tensor:
            ref, expert = whole(segment.source), number(segment.source)
            stored = files[ref.file].get_slice(ref.name)
            rows = slice(segment.source_start, segment.source_start + segment.length)
            index = (slice(None),) * segment.source_dim + (rows,)
            if ref == segment.source:
                return stored[index]  # type: ignore[no-any-return]
            sliced = (slice(expert, expert + 1), *index)
            return stored[sliced][0]  # type: ignore[no-any-return]

        yield read


def megatron_reader(source: MegatronFolder) -> Read:
    """Slices of a Megatron folder's tensors, memory mapped."""
    loaded: dict[str, dict[str, dict[str, Tensor]]] = {}

    def read(segment: Segment) -> Tensor:
        ref = segment.source
        if ref.file not in loaded:
            loaded[ref.file] = load_rank_file(source.directory / ref.file)
        tensor = loaded[ref.file][ref.section][ref.name]
        return tensor.narrow(segment.source_dim, segment.source_start, segment.length)

    return read
