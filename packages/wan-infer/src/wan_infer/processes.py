"""The processes that torchrun starts: who reads, who writes, and how the others get what they need.

The first process of all decides and writes files; the first of each node reads weights and encodes text and images. A
process that fails in this tells the others, so that all of them raise the same error.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wan_infer.errors import ProcessError, RequestError

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

# Others wait while one reads 14B parameters or decodes a long video. Nobody waits so long for a process that died:
# its connections break, and torchrun ends the others.
_PATIENCE = timedelta(hours=2)


class OneProcess:
    """A run in one process: it reads and writes everything itself.

    Args:
        device: where it computes.

    Attributes:
        device: the same.
        size: number of processes.
        first: whether this one decides and writes.
    """

    size = 1
    first = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def once(self, compute: Callable[[], T]) -> T:
        """Return what `compute` returns in the first process, which alone calls it; its error is raised in all."""
        return compute()

    def by_readers(self, compute: Callable[[], T]) -> T | None:
        """Return what `compute` returns in the first process of each node, None in others; errors are raised in all."""
        return compute()

    def tensors(self, compute: Callable[[], Sequence[Tensor | None]]) -> list[Tensor | None]:
        """Return the tensors that `compute` returns in the first process of each node, which alone calls it."""
        return list(compute())

    def module(self, load: Callable[[], M], build: Callable[[], M]) -> M:
        """Return what `load` reads, which the first process of each node does; others give its values to `build()`."""
        return load()


class Processes(OneProcess):
    """The processes of a job that torch.distributed connects.

    Args:
        device: where this one computes.

    Raises:
        ProcessError: a process was lost; so do all methods.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.first = self.rank == 0
        # torchrun numbers the nodes so; without it, all processes are on one.
        nodes = self._gathered(int(os.environ.get("GROUP_RANK", "0")))
        members = [[rank for rank, node in enumerate(nodes) if node == each] for each in sorted(set(nodes))]
        groups = [dist.new_group(ranks) for ranks in members] if len(members) > 1 else [dist.group.WORLD]
        self._node, self._reader = next(
            (group, ranks[0]) for group, ranks in zip(groups, members, strict=True) if self.rank in ranks
        )

    def once(self, compute: Callable[[], T]) -> T:
        """Return what `compute` returns in the first process, which alone calls it; its error is raised in all."""
        value, error = _tried(compute) if self.first else (None, None)
        told = self._told((value if error is None else None, _portable(error)), source=0)
        if error is not None or told[1] is not None:
            raise error or told[1]
        return cast(T, value if self.first else told[0])

    def by_readers(self, compute: Callable[[], T]) -> T | None:
        """Return what `compute` returns in the first process of each node, None in others; errors are raised in all."""
        value, error = _tried(compute) if self.rank == self._reader else (None, None)
        errors = [each for each in self._gathered(_portable(error)) if each is not None]
        if errors:
            raise error or errors[0]
        return value

    def tensors(self, compute: Callable[[], Sequence[Tensor | None]]) -> list[Tensor | None]:
        """Return the tensors that `compute` returns in the first process of each node, on the device of this one."""
        read = self.by_readers(lambda: [self._placed(tensor) for tensor in compute()])
        kinds = None if read is None else [None if x is None else (x.shape, x.dtype) for x in read]
        kinds = self._told(kinds, source=self._reader, group=self._node)
        values = read or [None if kind is None else torch.empty(kind[0], dtype=kind[1]) for kind in kinds]
        values = [self._placed(value) for value in values]
        with _explained():
            for value in values:
                if value is not None and value.numel():  # as bytes: not every backend has every dtype
                    dist.broadcast(value.view(-1).view(torch.uint8), self._reader, group=self._node)
        return values

    def module(self, load: Callable[[], M], build: Callable[[], M]) -> M:
        """Return what `load` reads, which the first process of each node does; others give its values to `build()`."""
        loaded = self.by_readers(load)
        values = self.tensors(lambda: [] if loaded is None else list(loaded.parameters()))
        if loaded is not None:
            return loaded
        with torch.device("meta"):
            module = build()
        names = (name for name, _ in module.named_parameters())
        module.load_state_dict(dict(zip(names, values, strict=True)), assign=True)
        return module.eval().requires_grad_(False)

    def _placed(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(self.device).contiguous()

    def _told(self, value: Any, *, source: int, group: dist.ProcessGroup | None = None) -> Any:
        box = [value]
        with _explained():
            dist.broadcast_object_list(box, source, group=group)
        return box[0]

    def _gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(found, value)
        return found


@contextmanager
def joined(device: torch.device) -> Iterator[OneProcess]:
    """Join the processes that torchrun started, until the end of the block; one process stays what it is.

    Args:
        device: of the machine; each process takes the one of its number on its node.

    Raises:
        RequestError: there are fewer devices than processes, or `device` is a single one.
    """
    if processes() == 1:
        yield OneProcess(device)
    elif dist.is_initialized():
        yield Processes(device)
    else:
        device = _own(device)
        backend = dist.get_default_backend_for_device(device)
        bound = None if device.type == "cpu" else device
        dist.init_process_group(backend, timeout=_PATIENCE, device_id=bound)
        try:
            yield Processes(device)
        finally:
            dist.destroy_process_group()


def processes() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _own(device: torch.device) -> torch.device:
    """The device of this process."""
    if device.type == "cpu":
        return device
    number = int(os.environ.get("LOCAL_RANK", "0"))
    module = torch.get_device_module(device)
    if ":" in str(device):
        raise RequestError(f"{device} is one device, and each process takes its own; say {device.type}")
    if number >= (count := module.device_count()):
        raise RequestError(
            f"there are {count} devices of the kind {device.type} for process {number} of this node, counted from 0; "
            f"start {count} processes a node, or take another device"
        )
    module.set_device(number)
    return torch.device(device.type, number)


def _tried(compute: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return compute(), None
    except Exception as error:  # noqa: BLE001  # raised by the caller, once the others know
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """An error that other processes can read."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
    except Exception:  # noqa: BLE001  # whatever an exception of some library does in there
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ProcessError(f"another process was lost ({reason}); look at what it wrote last") from error
