"""Every layout that a number of devices allows, what each costs, and the one to choose.

The cost of a layout is the time that it adds to the arithmetic of a step, in parts of it, as a sum of four:

* *recomputation*: 0.2 selective, 0.33 full: one more forward pass, of an MLP or a layer, beside the three passes that
  training takes;
* *bubble*: ``(pp - 1) / (vpp * micro-batches)``, the share in which pipeline stages wait (arXiv 2104.04473, 2.2);
* *uneven stages*: how much longer the slowest stage works than if all of them shared all work evenly; a vision tower
  that tensor parallelism can't cut is worked through by every rank;
* *tensor parallel*: each layer sums ``[tokens, hidden]``, of the tower ``[patches, width]``, over the ranks four times
  (a frozen tower's twice), by a ring that moves ``2 (tp - 1) / tp`` of it; set against the arithmetic at :data:`SPEED`
  and :data:`LINK`. Sequence parallelism moves the same. Only the order of magnitude of the two counts.

The vision tower stands whole on the first stage; where the slowest stage then works longer than it must, there is a
second candidate whose vision and language layers are dealt out one after the other, first stages holding vision layers
alone. Tensor parallelism cuts the tower where its heads and widths can be divided.

Gradients are summed over data-parallel ranks once a step; that is left out. Of the layouts that fit, the cheapest is
chosen; of equal ones that with the smallest tp_size, then pp_size, then the least memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from mm_finetune.planning.activations import Kernels
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.dealing import dealt, vision_passes, vision_tp_size, work
from mm_finetune.planning.load import Load
from mm_finetune.planning.memory import Layout, StageMemory, layout_states, predict
from mm_finetune.planning.weights import Training

if TYPE_CHECKING:
    from mm_finetune.config import TrainConfig

# What a device does of bfloat16 in practice, operations a second, and what it sends to one of its node, bytes a second:
# orders of magnitude of accelerators with 64 to 140 GB.
SPEED, LINK = 1.5e14, 1.0e11
# A tensor-parallel group stays in a node.
LARGEST_TP = 8
VPP_SIZES = (1, 2, 4)
RECOMPUTE = {"none": 0.0, "selective": 0.2, "full": 0.33}
# Of a device's memory: the driver's own, buffers of collectives, gaps between tensors.
RESERVE = 0.08


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its recomputation, its memory and its cost.

    Attributes:
        cost: name of each part, and the time that it adds, as a part of the arithmetic's.
    """

    layout: Layout
    recompute: str
    stages: list[StageMemory]
    cost: dict[str, float]

    @property
    def largest(self) -> float:
        """Bytes of the fullest device."""
        return max(stage.total for stage in self.stages)

    @property
    def added(self) -> float:
        """The whole cost."""
        return sum(self.cost.values())

    @property
    def order(self) -> tuple[float, int, int, int, float]:
        """The smallest one is chosen."""
        return round(self.added, 3), self.layout.tp_size, self.layout.pp_size, self.layout.vpp_size, self.largest


def fits(candidate: Candidate, device_bytes: float) -> bool:
    """Whether every device has room, a reserve of 8 % aside."""
    return candidate.largest <= device_bytes * (1 - RESERVE)


def candidates(
    config: TrainConfig, architecture: Architecture, training: Training, load: Load, kernels: Kernels, devices: int
) -> list[Candidate]:
    """Every legal layout, the best one by cost first, whether it fits or not.

    Args:
        config: batch sizes and packing.
        architecture: of the model.
        training: of the run; its recomputation is varied.
        load: its largest micro-batch; the number of them follows from the layout.
        kernels: of the device.
        devices: how many there are.
    """
    found = []
    kinds = {recompute: replace(training, recompute=recompute) for recompute in RECOMPUTE}
    for layout in legal(config, architecture, training, load, devices):
        own = replace(load, micro_batches=micro_batches(config, layout.dp_size), step_tokens=0)
        held, cost = layout_states(architecture, training, layout, kernels), costs(architecture, training, layout, own)
        for recompute, added in RECOMPUTE.items():
            stages = predict(architecture, kinds[recompute], layout, own, kernels, held)
            found.append(
                Candidate(layout=layout, recompute=recompute, stages=stages, cost=cost | {"recomputation": added})
            )
    return sorted(found, key=lambda candidate: candidate.order)


def legal(
    config: TrainConfig, architecture: Architecture, training: Training, load: Load, devices: int
) -> Iterator[Layout]:
    """The layouts that the model's sizes, the batch size and the number of devices allow."""
    sizes = (architecture.heads, architecture.kv_heads, architecture.ffn, architecture.vocabulary)
    tp_sizes = [tp for tp in range(1, LARGEST_TP + 1) if not any(size % tp for size in (*sizes, devices))]
    for tp_size in tp_sizes:
        vit_tp_size = vision_tp_size(architecture, tp_size)
        for pp_size in range(1, architecture.layers + 1):
            dp_size = devices // (tp_size * pp_size)
            if devices % (tp_size * pp_size) or not _deals(config, dp_size):
                continue
            for vpp_size in VPP_SIZES if pp_size > 1 else (1,):
                if pp_size * vpp_size > architecture.layers:
                    continue
                for llm, vit in dealt(architecture, training, load, pp_size, vpp_size, tp_size // vit_tp_size):
                    for sequence_parallel in (True, False) if tp_size > 1 else (False,):
                        yield Layout(
                            tp_size=tp_size, sequence_parallel=sequence_parallel, llm_pp_layers=llm, vit_pp_layers=vit,
                            vit_tp_size=vit_tp_size, dp_size=dp_size,
                        )  # fmt: skip


def _deals(config: TrainConfig, dp_size: int) -> bool:
    train = config.train
    if config.room is not None:
        return train.global_batch_size >= dp_size
    return train.global_batch_size % (train.micro_batch_size * dp_size) == 0


def micro_batches(config: TrainConfig, dp_size: int) -> int:
    """Of a step on a rank, records being as long as they may be."""
    train = config.train
    record = config.data.seq_length * (2 if config.preference else 1)
    held = train.micro_batch_size if config.room is None else config.room // record
    return ceil(train.global_batch_size / dp_size / max(1, held))


def costs(architecture: Architecture, training: Training, layout: Layout, load: Load) -> dict[str, float]:
    """The time that a layout adds, recomputation aside; see the module."""
    tp_size, vpp_size, vision = layout.tp_size, layout.vpp_size, architecture.vision
    llm, vit = (sum(lists, ()) for lists in (layout.llm_pp_layers, layout.vit_pp_layers))
    once = sum(work(architecture, training, load).of(llm, vit, layout.pp_size))
    sums = work(architecture, training, load, tp_size // layout.tower_tp_size).of(llm, vit, layout.pp_size)
    uneven = max(sums) / (once / layout.pp_size) - 1
    # Interleaved stages send vpp times as often; a hundredth keeps that from being free.
    bubble = (layout.pp_size - 1) / (vpp_size * load.micro_batches) + 0.01 * (vpp_size - 1)
    summed = 4 * architecture.layers * load.tokens * architecture.hidden
    if layout.tower_tp_size > 1:
        summed += (vision_passes(training) + 1) * vision.depth * load.patches * vision.width
    moved = 2 * (tp_size - 1) / tp_size * summed * training.element
    tensor = (moved / LINK) / (once / tp_size / SPEED)
    return {"bubble": bubble, "uneven stages": uneven, "tensor parallel": tensor}


def chosen(found: list[Candidate], device_bytes: float) -> Candidate | None:
    """The first that fits; None: none does."""
    return next((candidate for candidate in found if fits(candidate, device_bytes)), None)
