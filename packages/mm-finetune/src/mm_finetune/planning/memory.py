"""Memory of every pipeline stage of a layout, by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from mm_finetune.planning.activations import Decoder, Kernels, Tower
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.load import Load
from mm_finetune.planning.schedule import events
from mm_finetune.planning.weights import Inventory, States, Training, Weight, states

LayerLists: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is laid out over devices.

    Attributes:
        llm_pp_layers: decoder layers of each pipeline stage; a row for each virtual stage, as mm-convert has them.
        vit_pp_layers: vision layers likewise.
        vit_tp_size: tensor-parallel size of the vision tower, the language model's or 1: each rank has the whole of
            it; 0: the language model's.
        dp_size: data-parallel size.
    """

    tp_size: int
    sequence_parallel: bool
    llm_pp_layers: LayerLists
    vit_pp_layers: LayerLists
    vit_tp_size: int = 0
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

    @property
    def tower_tp_size(self) -> int:
        """Ranks that share a layer of the vision tower."""
        return self.vit_tp_size or self.tp_size

    def chunks(self) -> list[list[Chunk]]:
        """What each pipeline stage holds, a chunk for each of its virtual stages."""
        llm, vit = (_ranges(sum(lists, ())) for lists in (self.llm_pp_layers, self.vit_pp_layers))
        merger = max(number for number, layers in enumerate(vit) if layers)
        words = next(number for number, layers in enumerate(llm) if layers)
        flat = [
            Chunk(llm=llm[number], vit=vit[number], merges=number == merger, words=number == words, last=not behind)
            for number, behind in enumerate(reversed(range(len(llm))))
        ]
        return [flat[stage :: self.pp_size] for stage in range(self.pp_size)]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A virtual stage, or where there are none a stage.

    Attributes:
        llm: numbers of its decoder layers.
        vit: of its vision layers; the first one has the patch embedding before it.
        merges: the tower's merger stands here.
        words: the embedding stands here.
        last: the output layer stands here.
    """

    llm: range
    vit: range
    merges: bool
    words: bool
    last: bool


def _ranges(counts: Sequence[int]) -> list[range]:
    return [range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]


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
    tower = Tower(architecture, training, layout.tower_tp_size, load=load, kernels=kernels)
    chunks = layout.chunks()
    return [
        _stage(decoder, tower, layout, stage, own, one)
        for stage, (own, one) in enumerate(zip(chunks, held, strict=True))
    ]


def layout_states(architecture: Architecture, training: Training, layout: Layout, kernels: Kernels) -> list[States]:
    """Of each stage what depends on neither data nor recomputation."""
    inventory = Inventory(architecture, training, layout.tp_size, layout.vit_tp_size)
    stages = layout.chunks()
    # Of a stage that has both ends, the output layer is the embedding itself.
    copied = architecture.tied and not any(chunk.words and chunk.last for chunks in stages for chunk in chunks)
    return [
        states(
            [_weights(inventory, chunk, copied=copied) for chunk in chunks],
            training,
            layout.dp_size,
            roots=kernels.roots,
        )
        for chunks in stages
    ]


def _weights(inventory: Inventory, chunk: Chunk, *, copied: bool) -> list[Weight]:
    parts = [inventory.patch_embedding()] if chunk.vit and chunk.vit.start == 0 else []
    parts += map(inventory.vision_layer, chunk.vit)
    parts += [inventory.merger()] if chunk.merges else []
    parts += [inventory.embedding(copied=copied)] if chunk.words else []
    parts += map(inventory.layer, chunk.llm)
    parts += [inventory.output(copied=copied)] if chunk.last else []
    return [weight for part in parts for weight in part]


def _stage(
    decoder: Decoder, tower: Tower, layout: Layout, stage: int, chunks: Sequence[Chunk], held: States
) -> StageMemory:
    training, load = decoder.training, decoder.load
    peak = _peak([_part(decoder, tower, chunk, held) for chunk in chunks], stage, layout, load.micro_batches)
    tokens, pixels = load.data_bytes
    # Megatron keeps one buffer for the tokens that sequence parallelism gathers.
    gathers = decoder.cut and any(chunk.llm for chunk in chunks)
    gathered = load.tokens * decoder.architecture.hidden * training.element if gathers else 0
    return StageMemory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=peak[0],
        moment=peak[1] + gathered,
        micro_batches=peak[2],
        data=tokens + (pixels * tower.vision.patch if stage == 0 else 0),
        step=max(held.step, held.gradients if decoder.kernels.copies and training.distributed else 0),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A chunk of a stage, for one micro-batch.

    Attributes:
        kept: from the forward to the backward pass.
        begin: besides what others keep, at the beginning of the forward pass.
        forward: besides, at the end of the forward pass.
        backward: besides, at the beginning of the backward pass.
        end: what stands at the end of the backward pass in the place of `kept` and all else.
    """

    kept: float
    begin: float
    forward: float
    backward: float
    end: float


def _part(decoder: Decoder, tower: Tower, chunk: Chunk, held: States) -> _Part:
    layers = [decoder.layers.layer(number) for number in chunk.llm]
    vision = tower.kept(chunk.vit, merges=chunk.merges)
    kept = sum(layer.saved for layer in layers) + vision.saved
    kept += decoder.positions() if chunk.llm else 0
    # What came in stays, where it is not the input of a layer; what a stage sends, until it has gone backwards.
    kept += tower.features if chunk.words and not chunk.merges else 0
    kept += 0 if chunk.last else decoder.hidden if chunk.llm else tower.features if chunk.merges else tower.hidden
    loss_kept, loss_moment = decoder.loss() if chunk.last else (0.0, 0.0)
    kept += decoder.final_norm() if chunk.last else 0
    seen = vision.again + vision.moment
    backward = max((layer.again + layer.moment for layer in layers), default=seen) + held.largest_inner
    # At the end the tower's backward pass, or the embedding's gradient.
    end = (decoder.hidden if chunk.llm else tower.hidden) + max(vision.saved + seen, held.largest)
    return _Part(kept=kept, begin=vision.begin, forward=loss_kept + loss_moment, backward=backward, end=end)


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
            moments = ((held - part.kept, part.begin), (held, part.forward))
        else:
            moments = ((held, part.backward), (held - part.kept, part.end))
        for kept, beside in moments:
            if kept + beside > most:
                most, best = kept + beside, (kept, beside, under_way)
        if not forwards:
            held -= part.kept
            under_way -= 1
    return best[0], best[1], best[2] / layout.vpp_size
