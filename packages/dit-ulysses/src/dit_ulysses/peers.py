"""A process group as a rank of it sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ulysses.errors import GroupError

# Backends that move tensors of one kind of device only; others (mpi, ucc, custom ones) are taken at their word.
_DEVICES = {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}


@dataclass(frozen=True)
class Peers:
    """A process group, and where this process is in it.

    Attributes:
        group: the group.
        rank: of this process, counted inside of the group.
        names: of all of its ranks in the numbers of the whole job.
        device: of what is sent besides the caller's tensors; the processor's memory where the group moves that.
    """

    group: dist.ProcessGroup
    rank: int
    names: tuple[int, ...]
    device: torch.device

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.names)

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, *tensors: Tensor) -> Peers:
        """Look at a group; the whole job when None.

        Args:
            group: that is looked at.
            tensors: that it shall move.

        Raises:
            GroupError: there is no process group yet, this process is not in it, or it does not move such tensors.
        """
        if not dist.is_initialized():
            raise GroupError(
                "there is no process group; call torch.distributed.init_process_group first, under torchrun"
            )
        if group is None:
            group = dist.group.WORLD
        # A process that is left out gets a placeholder, and no group, from new_group.
        if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
            raise GroupError(
                f"rank {dist.get_rank()} is not in the group that was given; a group is for its own ranks only"
            )
        config = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
        backends = dict(part.split(":") for part in config.split(",") if ":" in part)
        moved = [kind for kind, backend in backends.items() if _DEVICES.get(backend, kind) == kind]
        _check_devices(tensors, moved, config)
        device = torch.device("cpu" if "cpu" in moved or not moved else moved[0])
        return cls(group, dist.get_rank(group), tuple(dist.get_process_group_ranks(group)), device)


def _check_devices(tensors: tuple[Tensor, ...], moved: list[str], config: str) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise GroupError(f"tensors are on {', '.join(sorted(map(str, devices)))}; one device is expected")
    for kind in {device.type for device in devices}.difference(moved):
        raise GroupError(
            f"the tensors are on {kind}, and this group moves those on {' and '.join(moved)} ({config}); make a group "
            "for their device, or move the tensors"
        )


def named(ranks: Iterable[int]) -> str:
    """Say ranks: "rank 2", "ranks 0, 1 and 3"."""
    *most, last = [str(rank) for rank in ranks]
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
