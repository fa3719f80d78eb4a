"""The processes of a data-parallel evaluation, and what they tell one another: objects, through the CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mm_finetune.launch import process_rank

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Team:
    """Where this process stands among `size` others."""

    rank: int
    size: int
    device: torch.device

    def joined(self, mine: T) -> list[T]:
        """What every process has, in the order of ranks; every process must call."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def from_first(self, value: T) -> T:
        """What the first process has; every process must call."""
        if self.size == 1:
            return value
        told: list[Any] = [value]
        dist.broadcast_object_list(told, src=0)
        first: T = told[0]
        return first


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """Join the processes that torchrun started, or be the only one; leave them at the end."""
    rank, size = process_rank()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu")
    if accelerator is not None:
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device.index)
    if size > 1:
        dist.init_process_group("gloo")
    try:
        yield Team(rank=rank, size=size, device=device)
    finally:
        if size > 1:
            dist.destroy_process_group()
