"""What the processes of a run tell each other about data, as few and small messages as possible.

``once`` is used before the first step, the others once a step, by every process at the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mm_finetune.data.batches import Batch
from mm_finetune.data.faults import Fault
from mm_finetune.errors import FinetuneError

T = TypeVar("T")

Pixels = Literal["read", "receive", "none"]
"""What a process does about pixels: it decodes them, gets them from one that does, or needs none."""


class Exchange(Protocol):
    """How processes talk."""

    @property
    def pixels(self) -> Pixels:
        """What this process does about pixels."""

    def once(self, make: Callable[[], T]) -> T:
        """What one process makes, on all of them; its :class:`FinetuneError` is raised on all of them."""

    def union(self, faults: Sequence[Fault]) -> list[Fault]:
        """The faults of all processes, in one order."""

    def fill(self, batch: Batch, patch_width: int) -> Batch:
        """The batch, already on the device, with the pixels that this process needs."""


class Alone:
    """One process."""

    pixels: Pixels = "read"

    def once(self, make: Callable[[], T]) -> T:
        """Made here."""
        return make()

    def union(self, faults: Sequence[Fault]) -> list[Fault]:
        """They are all."""
        return list(faults)

    def fill(self, batch: Batch, patch_width: int) -> Batch:
        """Nothing is missing."""
        return batch


class Processes:
    """The processes of torch.distributed.

    Args:
        device: where tensors for collectives live.
        needs_pixels: this process embeds pictures (it has the first pipeline stage).
        group: the processes that need the same pixels (tensor parallel); its first one reads them. None: alone.
    """

    def __init__(self, device: torch.device, *, needs_pixels: bool, group: Any = None) -> None:
        self._device, self._group = device, group
        self._shared = group is not None and dist.get_world_size(group) > 1
        self._reader = dist.get_process_group_ranks(group)[0] if self._shared else dist.get_rank()
        reads = dist.get_rank() == self._reader
        self.pixels: Pixels = "none" if not needs_pixels else "read" if reads else "receive"

    def once(self, make: Callable[[], T]) -> T:
        """Made by rank 0."""
        told: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                told = [make(), None]
            except FinetuneError as error:
                told = [None, error]
        dist.broadcast_object_list(told, src=0, device=self._device)
        if told[1] is not None:
            raise told[1]
        made: T = told[0]
        return made

    def union(self, faults: Sequence[Fault]) -> list[Fault]:
        """One number is exchanged where there are none, as nearly always."""
        found = torch.tensor([len(faults)], device=self._device)
        dist.all_reduce(found)
        if not int(found):
            return []
        gathered: list[list[Fault]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, list(faults))
        return sorted({fault.record: fault for told in reversed(gathered) for fault in told}.values())

    def fill(self, batch: Batch, patch_width: int) -> Batch:
        """Pixels of the process that read them; their shapes follow from the grids, which all know."""
        if self.pixels == "none" or not self._shared:
            return batch
        filled: dict[str, Any] = {
            name: self._received(getattr(batch, name), grid, patch_width)
            for name, grid in (
                ("pixel_values", batch.image_grid_thw),
                ("pixel_values_videos", batch.video_grid_thw),
            )
            if grid is not None
        }
        return replace(batch, **filled)

    def _received(self, pixels: Tensor | None, grid: Tensor, width: int) -> Tensor:
        if self.pixels == "receive" or pixels is None:
            pixels = torch.empty(int(grid.prod(dim=1).sum()), width, device=self._device)
        dist.broadcast(pixels, src=self._reader, group=self._group)
        return pixels
