"""What a process holds of the optimizer, as boxes of whole tensors: the same names and places in every layout.

Megatron's ``sharded_state_dict`` says which box of which whole tensor a parameter is, layers by their number in the
model. The distributed optimizer keeps of a parameter the flat range ``[start, stop)``; without it the range is all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from mm_finetune.engine.step import Trainer

PARAM = "param"  # the weights, in float32 where the optimizer has them so
STEP = "step"


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangular part of a whole tensor.

    Attributes:
        key: name of the whole tensor.
        whole: its shape.
        offset: where the part begins, in each dimension.
        shape: of the part.
    """

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A flat range of a box, which this process holds.

    Attributes:
        box: where it belongs.
        start: first element, the box laid out row by row.
        stop: one past the last.
        begin: where it begins within the optimizer's own tensors, flat.
        main: the optimizer's weights, flat or not; float32.
        dtype: of the model's own weights.
        state: what the optimizer keeps of them; empty before the first step.
        group: the optimizer's settings of them.
        replica: other processes hold the same; the one that writes has 0.
    """

    box: Box
    start: int
    stop: int
    begin: int
    main: Tensor
    dtype: torch.dtype
    state: dict[str, Any]
    group: dict[str, Any]
    replica: int

    def part(self, tensor: Tensor) -> Tensor:
        """Of a tensor that is laid out as `main`, this piece; shares its memory."""
        return tensor.detach().reshape(-1)[self.begin : self.begin + self.stop - self.start]

    def tensors(self) -> dict[str, Tensor]:
        """All of it that is of the size of the weights, by name."""
        like = {name: t for name, t in self.state.items() if isinstance(t, Tensor) and t.numel() == self.main.numel()}
        like.pop(STEP, None)
        return {name: self.part(tensor) for name, tensor in {PARAM: self.main, **like}.items()}


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A parameter's range that the optimizer has here."""

    parameter: Tensor
    main: Tensor
    start: int
    state: dict[str, Any]
    group: dict[str, Any]
    cut: bool


def pieces_of(trainer: Trainer) -> list[Piece]:
    """Everything that is trained here; empty on a process whose weights are all frozen."""
    ranks, boxes = trainer.ranks, _boxes(trainer)
    pieces: list[Piece] = []
    for number, held in enumerate(_held(trainer.optimizer)):
        # Data-parallel copies take turns at writing; with the distributed optimizer there are none.
        turn = 0 if held.cut else (ranks.dp_rank - number) % ranks.dp_size
        for box, first, copy in boxes[id(held.parameter)]:
            start, stop = max(held.start, first), min(held.start + held.main.numel(), first + box.size)
            if start < stop:
                pieces.append(
                    Piece(
                        box=box, start=start - first, stop=stop - first, begin=start - held.start, main=held.main,
                        dtype=held.parameter.dtype, state=held.state, group=held.group, replica=turn or copy,
                    )
                )  # fmt: skip
    return pieces


def frozen_sum(trainer: Trainer) -> int:
    """One number that the weights which aren't trained give in every layout; all processes must call.

    Bits as whole numbers, summed modulo 2⁶⁴, each tensor times a number made of its name.
    """
    total = 0
    boxes = _boxes(trainer)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad or trainer.ranks.dp_rank:
            continue
        flat = parameter.detach().reshape(-1).view(_BITS[parameter.element_size()])
        for box, first, copy in boxes[id(parameter)]:
            if not copy:
                total += int(flat[first : first + box.size].sum(dtype=torch.int64)) * (crc32(box.key.encode()) | 1)
    told: list[int] = [0] * trainer.ranks.world_size
    dist.all_gather_object(told, total)
    return sum(told) % 2**64


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def set_weights(trainer: Trainer) -> None:
    """The model takes over the optimizer's weights, on every process; all must call."""
    with torch.no_grad():
        for optimizer in _optimizers(trainer.optimizer):
            if not getattr(optimizer, "is_stub_optimizer", False) and hasattr(
                optimizer, "_copy_main_params_to_model_params"
            ):
                optimizer._copy_main_params_to_model_params()
        if trainer.config.distributed_optimizer:
            for chunk in trainer.wrapped:
                chunk.start_param_sync(force_sync=True)


def _boxes(trainer: Trainer) -> dict[int, list[tuple[Box, int, int]]]:
    """By the identity of a parameter: its boxes, where each begins in it (flat), and 0 on the process that writes."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    metadata = {
        # Names then have a layer's number in them; else all layers of a kind are one tensor.
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    found: dict[int, list[tuple[Box, int, int]]] = {}
    for chunk in trainer.model:
        state: dict[str, Any] = chunk.sharded_state_dict(metadata=metadata)
        parameters = {name: entry.data for name, entry in state.items() if isinstance(entry.data, Tensor)}
        apply_factories(state)
        for name, parameter in parameters.items():
            entries = state[name]
            for entry in entries if isinstance(entries, list) else [entries]:
                assert isinstance(entry, ShardedTensor), f"{name} is no tensor of a known place"
                box = Box(
                    key=entry.key,
                    whole=tuple(entry.global_shape),
                    offset=tuple(entry.global_offset),
                    shape=(1,) * entry.prepend_axis_num + tuple(entry.local_shape),
                )
                assert entry.data.is_contiguous(), f"{name} is cut in a way that is not contiguous"
                first = (entry.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
                # Where each tensor-parallel rank has the whole tower, Megatron takes each for the only one.
                twice = getattr(parameter, "whole", False) and trainer.ranks.tp_rank > 0
                found.setdefault(id(parameter), []).append((box, first, _copies(entry.replica_id) or int(twice)))
    return found


def _copies(replica: Any) -> int:
    """Whether another process of the same data-parallel rank writes it; the last number is that rank."""
    return 0 if isinstance(replica, int) else int(any(replica[:-1]))


def _optimizers(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _held(optimizer: Any) -> Iterator[_Held]:
    """Megatron's kinds of optimizers: distributed, mixed precision, float32."""
    for one in _optimizers(optimizer):
        inner = one.optimizer
        if inner is None or getattr(one, "is_stub_optimizer", False):
            continue
        owners = {id(main): parameter for parameter, main in _mixed(one)}
        places = getattr(one, "model_param_group_index_map", None)
        if places is not None:
            owners = {
                id(inner.param_groups[group]["params"][number]): parameter
                for parameter, (group, number) in places.items()
            }
        for group in inner.param_groups:
            for main in group["params"]:
                parameter = owners.get(id(main), main)
                start = 0 if places is None else one._get_model_param_range_map(parameter)["param"].start
                yield _Held(
                    parameter=parameter, main=main, start=start, state=inner.state[main], group=group,
                    cut=places is not None,
                )  # fmt: skip


def _mixed(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of the model with their float32 copies, where the optimizer is not distributed."""
    groups = zip(
        getattr(optimizer, "float16_groups", ()), getattr(optimizer, "fp32_from_float16_groups", ()), strict=True
    )
    for parameters, mains in groups:
        yield from zip(parameters, mains, strict=True)
