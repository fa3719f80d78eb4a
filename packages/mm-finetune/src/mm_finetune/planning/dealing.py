"""Which stage of a pipeline gets which layers, so that all work about equally long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from mm_finetune.errors import ConfigError
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.load import Load
from mm_finetune.planning.memory import LayerLists
from mm_finetune.planning.weights import Training


def vision_tp_size(architecture: Architecture, tp_size: int) -> int:
    """The tensor-parallel size of the vision tower: the language model's, or 1 where that does not divide its sizes."""
    vision = architecture.vision
    sizes = (vision.heads, vision.inner, vision.width * vision.merge**2)
    return 1 if any(size % tp_size for size in sizes) else tp_size


def dealt(
    architecture: Architecture, training: Training, load: Load, pp_size: int, vpp_size: int, copies: int
) -> list[tuple[LayerLists, LayerLists]]:
    """Language and vision layers of each stage so that all work about equally long, the tower being whole on the first.

    A second pair deals the vision layers out too, where the slowest stage then has less to do.

    Args:
        architecture: of the model.
        training: what trains.
        load: a micro-batch.
        pp_size: pipeline stages.
        vpp_size: virtual stages of each.
        copies: tensor-parallel ranks that work on the same of the tower.

    Raises:
        ConfigError: there are more stages than language layers.
    """
    done, stages = work(architecture, training, load, copies), pp_size * vpp_size
    depth, layers = architecture.vision.depth, architecture.layers
    if stages > layers:
        raise ConfigError(f"parallel.pp_size {pp_size} x vpp_size {vpp_size} stages are too many for {layers} layers")
    whole = [depth, *[0] * (stages - 1)]
    pairs = [(_beside_the_tower(done, layers, depth, stages), whole)]
    if stages > 1:
        several = _one_after_the_other(done, layers, depth, stages)
        # Of virtual stages Megatron shares a tied weight between the first ranks and the last one (engine/stages.py).
        begins = next(stage for stage, count in enumerate(several[0]) if count)
        tied = architecture.tied and vpp_size > 1 and begins >= pp_size - 1
        first, second = (max(done.of(llm, vit, pp_size)) for llm, vit in (pairs[0], several))
        pairs += [several] if second < 0.999 * first and not tied else []
    return [(_rows(llm, pp_size), _rows(vit, pp_size)) for llm, vit in pairs]


def _beside_the_tower(done: Work, layers: int, depth: int, stages: int) -> list[int]:
    """One language layer after the other goes to the stage that has least to do, a later one if several have."""
    counts = [1] * stages
    loads = [done.layer] * stages
    loads[0] += done.tower(depth)
    loads[-1] += done.output
    for _ in range(layers - stages):
        stage = min(range(stages), key=lambda number: (loads[number], -number))
        counts[stage] += 1
        loads[stage] += done.layer
    return counts


def _one_after_the_other(done: Work, layers: int, depth: int, stages: int) -> tuple[list[int], list[int]]:
    """All layers in a row, cut into stages so that the slowest one works as short as possible, and the others alike."""
    row = [done.vision] * depth + [done.layer] * layers
    row[0] += done.patches
    row[depth - 1] += done.merger
    row[-1] += done.output
    low, most = max(row), sum(row)
    for _ in range(30):
        middle = (low + most) / 2
        low, most = (low, middle) if _needed(row, middle)[-1] <= stages else (middle, most)
    bounds = _cut(row, most, stages)
    llm = [max(0, stop - max(start, depth)) for start, stop in bounds]
    vit = [max(0, min(stop, depth) - start) for start, stop in bounds]
    return llm, vit


def _needed(row: Sequence[float], most: float) -> list[int]:
    """How many stages of at most so much the first 0, 1, 2, … of a row take."""
    counts, held = [0], most
    for each in row:
        opens = held + each > most
        held = each if opens else held + each
        counts.append(counts[-1] + opens)
    return counts


def _cut(row: Sequence[float], most: float, stages: int) -> list[tuple[int, int]]:
    """Stages of at most so much, none empty; from the last one on each takes its share of what is left, about."""
    needed, sums = _needed(row, most), list(accumulate(row, initial=0.0))
    bounds, stop = [], len(row)
    for before in reversed(range(stages)):
        share = sums[stop] / (before + 1)
        starts = [start for start in range(before, stop) if needed[start] <= before]
        # A rounding more, since sums are made in another order here.
        starts = [start for start in starts if sums[stop] - sums[start] <= most * (1 + 1e-9)]
        start = min(starts, key=lambda start: abs(sums[stop] - sums[start] - share))
        bounds.append((start, stop))
        stop = start
    return bounds[::-1]


def _rows(counts: Sequence[int], pp_size: int) -> LayerLists:
    return tuple(tuple(counts[start : start + pp_size]) for start in range(0, len(counts), pp_size))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of a micro-batch, of all tensor-parallel ranks together; attention included.

    Attributes:
        layer: of a decoder layer.
        vision: of a vision layer.
        patches: of the patch embedding.
        merger: of the vision tower's.
        output: of the output layer.
    """

    layer: float
    vision: float
    patches: float
    merger: float
    output: float

    def tower(self, depth: int) -> float:
        """Of the vision tower."""
        return self.patches + depth * self.vision + self.merger

    def of(self, llm: Sequence[int], vit: Sequence[int], pp_size: int) -> list[float]:
        """Of each pipeline stage, from the layers of its virtual stages in the order in which data runs."""
        sums = [count * self.layer + seen * self.vision for count, seen in zip(llm, vit, strict=True)]
        sums[0] += self.patches
        sums[max(stage for stage, count in enumerate(vit) if count)] += self.merger
        sums[-1] += self.output
        return [sum(sums[stage::pp_size]) for stage in range(pp_size)]


def work(architecture: Architecture, training: Training, load: Load, copies: int = 1) -> Work:
    """What a micro-batch asks for.

    As in :mod:`mm_finetune.watching.flops`: two operations for each weight and row, in three passes; a tower of which
    nothing trains has one.

    Args:
        architecture: of the model.
        training: what trains.
        load: the micro-batch.
        copies: tensor-parallel ranks that work on the same of the tower.
    """
    hidden, shapes = architecture.hidden, architecture.shapes()

    def matrices(prefix: str) -> int:
        return sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix) and len(shape) > 1)

    seen = 2 * vision_passes(training) * load.patches * copies
    return Work(
        layer=3 * (2 * matrices("model.layers.0.") * load.tokens + 4 * hidden * load.rows * load.length**2),
        vision=seen * matrices("visual.blocks.0."),
        patches=seen * matrices("visual.patch_embed."),
        # The merger has a row for four patches.
        merger=seen * matrices("visual.merger.") / architecture.vision.merge**2,
        output=3 * 2 * architecture.vocabulary * hidden * load.loss_tokens,
    )


def vision_passes(training: Training) -> int:
    """Through the vision tower: three where it trains, one where it is frozen."""
    names = [name for name in training.rates if name.startswith("visual.")]
    adapted = any(training.adapter_trains(layer) for layer in training.adapters if layer.startswith("visual."))
    return 3 if adapted or any(map(training.trains, names)) else 1
