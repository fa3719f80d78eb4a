"""Memory of every pipeline stage of a layout, by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mm_finetune.planning.activations import Decoder, Kept, Kernels, Tower
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.load import Load
from mm_finetune.planning.schedule import events
from mm_finetune.planning.weights import Inventory, States, Training, states


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is laid out over devices.

    Attributes:
        llm_pp_layers: decoder layers of each pipeline stage; a row for each virtual stage, as mm-convert has them.
        dp_size: data-parallel size.
    """

    tp_size: int
    sequence_parallel: bool
    llm_pp_layers: tuple[tuple[int, ...], ...]
    dp_size: int

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return len(self.llm_pp_layers[0])

    @property
    def vpp_size(self) -> int:
        """Virtual stages of each."""
        return len(self.llm_pp_layers)

    @property
    def devices(self) -> int:
        """All of them."""
        return self.tp_size * self.pp_size * self.dp_size


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of a device of one pipeline stage.

    Attributes:
        weights: in the run's precision.
        gradients: Megatron's float32 buffer.
        optimizer: float32 weights (bfloat16 runs) and two moments.
        activations: what micro-batches under way have left, at the fullest moment.
        moment: what stands beside that for a moment: gradients on their way, logits of a chunk, a layer that is
            computed again.
        data: the step's micro-batches.
        micro_batches: under way at that moment.
        step: what the optimizer needs besides while it steps, when no activations are there.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: float
    moment: float
    data: int
    micro_batches: float
    step: int

    @property
    def total(self) -> float:
        """The most at any time."""
        lasting = self.weights + self.gradients + self.optimizer + self.data
        return lasting + max(self.activations + self.moment, self.step)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A chunk of a stage, for one micro-batch.

    Attributes:
        kept: from the forward to the backward pass.
        forward: besides, at the end of the forward pass.
        backward: besides, at the beginning of the backward pass.
        end: what stands at the end of the backward pass in the place of `kept` and all else.
    """

    kept: float
    forward: float
    backward: float
    end: float


def predict(
    architecture: Architecture,
    training: Training,
    layout: Layout,
    load: Load,
    kernels: Kernels,
    held: Sequence[States] | None = None,
) -> list[StageMemory]:
    """Memory of each pipeline stage.

    Args:
        architecture: of the model.
        training: precision, recomputation, what trains.
        layout: over the devices.
        load: what goes through the model.
        kernels: of the device.
        held: what :func:`layout_states` gives, where it is known already.
    """
    if layout.sequence_parallel:
        load = load.padded(layout.tp_size)
    held = held or layout_states(architecture, training, layout, kernels)
    decoder = Decoder(
        architecture, training, layout.tp_size, sequence_parallel=layout.sequence_parallel, load=load, kernels=kernels
    )
    tower = Tower(architecture, training, load=load, kernels=kernels).kept()
    return [_stage(decoder, tower, layout, stage, one) for stage, one in enumerate(held)]


def _stage(decoder: Decoder, tower: Kept, layout: Layout, stage: int, held: States) -> StageMemory:
    architecture, training, load = decoder.architecture, decoder.training, decoder.load
    parts = [
        _part(decoder, tower if first else Kept(), numbers, held, last=last)
        for numbers, first, last in _chunks(layout, stage)
    ]
    peak = _peak(parts, stage, layout, load.micro_batches)
    tokens, pixels = load.data_bytes
    # Megatron keeps one buffer for the tokens that sequence parallelism gathers.
    gathered = load.tokens * architecture.hidden * training.element if decoder.cut else 0
    return StageMemory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=peak[0],
        moment=peak[1] + gathered,
        micro_batches=peak[2],
        data=tokens + (pixels * architecture.vision.patch if stage == 0 else 0),
        step=max(held.step, held.gradients if decoder.kernels.copies and training.distributed else 0),
    )


def layout_states(architecture: Architecture, training: Training, layout: Layout, kernels: Kernels) -> list[States]:
    """Of each stage what depends on neither data nor recomputation."""
    inventory = Inventory(architecture, training, layout.tp_size)
    pipeline = layout.pp_size > 1
    found = []
    for stage in range(layout.pp_size):
        chunks = []
        for numbers, first, last in _chunks(layout, stage):
            weights = [weight for number in numbers for weight in inventory.layer(number)]
            weights += [*inventory.tower(), *inventory.embedding(pipeline=pipeline)] if first else []
            chunks.append(weights + (inventory.output(pipeline=pipeline) if last else []))
        found.append(states(chunks, training, layout.dp_size, foreach=kernels.foreach))
    return found


def _chunks(layout: Layout, stage: int) -> list[tuple[range, bool, bool]]:
    """For each chunk of a stage its layers, and whether it is the first and the last of the model."""
    found, start = [], 0
    for row, counts in enumerate(layout.llm_pp_layers):
        for place, count in enumerate(counts):
            if place == stage:
                last = (row, place) == (layout.vpp_size - 1, layout.pp_size - 1)
                found.append((range(start, start + count), (row, place) == (0, 0), last))
            start += count
    return found


def _part(decoder: Decoder, tower: Kept, numbers: range, held: States, *, last: bool) -> _Part:
    layers = [decoder.layer(number) for number in numbers]
    kept = sum(layer.saved for layer in layers) + tower.saved + decoder.positions()
    # What a stage sends stays until it has gone backwards.
    kept += 0 if last else decoder.hidden
    backward = max(layer.again + layer.moment for layer in layers) + held.largest_inner
    loss_kept, loss_moment = decoder.loss() if last else (0.0, 0.0)
    kept += decoder.final_norm() if last else 0
    # At the end the tower's backward pass, or the embedding's gradient.
    end = decoder.hidden + max(tower.saved + tower.again + tower.moment, held.largest)
    return _Part(kept=kept, forward=loss_kept + loss_moment, backward=backward, end=end)


def _peak(parts: Sequence[_Part], stage: int, layout: Layout, micro_batches: int) -> tuple[float, float, float]:
    """The fullest moment: what is kept, what stands beside it, micro-batches under way (parts count as fractions)."""
    # Longer steps go on as these do.
    count = min(micro_batches, 3 * layout.pp_size)
    if layout.vpp_size > 1:
        count = -(-count // layout.pp_size) * layout.pp_size
    best, most, held, under_way = (0.0, 0.0, 0), 0.0, 0.0, 0
    for number, forwards in events(stage, layout.pp_size, layout.vpp_size, count):
        part = parts[number]
        if forwards:
            held += part.kept
            under_way += 1
            moments: tuple[tuple[float, float], ...] = ((held, part.forward),)
        else:
            moments = ((held, part.backward), (held - part.kept, part.end))
        for kept, beside in moments:
            if kept + beside > most:
                most, best = kept + beside, (kept, beside, under_way)
        if not forwards:
            held -= part.kept
            under_way -= 1
    return best[0], best[1], best[2] / layout.vpp_size
