"""Layer lists for a pipeline: stages that work about equally long and fit about equally well.

A stage costs its part of the model's work or of the memory, whichever is larger. *Work*: parameters of matrices
times the tokens that pass them, to which the time of a training step is proportional (2 operations forwards and 4
backwards for each). *Memory*: 18 bytes for each parameter (bf16 weight, fp32 gradient, master weight and Adam's two
moments; an optimizer that is sharded takes less), and what micro batches leave until they go backwards: in the 1F1B
schedule without recomputation, pipeline rank p of P keeps P - p of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import inf, prod
from pathlib import Path
from shlex import quote

from mm_convert.convert import Converter
from mm_convert.errors import LayoutError, ModelError
from mm_convert.families import CONVERTERS
from mm_convert.huggingface import HuggingFaceFolder
from mm_convert.inspection import converters_for
from mm_convert.layout import Layout, Part
from mm_convert.plans import BYTES, Spec
from mm_convert.relate import by_canonical_name

TRAINING_BYTES = 18
# Qwen's merger, InternVL's pixel shuffle: a text token stands for 2 x 2 patches.
PATCHES = 4


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """What one pipeline rank holds and does.

    Attributes:
        llm_layers: language layers.
        vit_layers: vision layers.
        parameters: of all its stages, all tensor-parallel ranks together.
        work: its part of the model's work.
        memory_bytes: weights, optimizer and activations of one card.
    """

    llm_layers: int
    vit_layers: int
    parameters: int
    work: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A layout for a number of pipeline ranks.

    Attributes:
        layout: the layout.
        ranks: what each pipeline rank gets.
        reasons: why, a line each.
        line: the command to type.
    """

    layout: Layout
    ranks: tuple[RankLoad, ...]
    reasons: tuple[str, ...]
    line: str


@dataclass(frozen=True)
class _Load:
    """What a layer, with what belongs beside it, adds to a stage: parameters, work, bytes left by a micro batch."""

    parameters: int = 0
    work: float = 0
    activations: float = 0

    def __add__(self, other: _Load) -> _Load:
        return _Load(self.parameters + other.parameters, self.work + other.work, self.activations + other.activations)


def propose(
    hf_dir: str | Path,
    *,
    pp_size: int,
    vpp_size: int = 1,
    tp_size: int = 1,
    tokens: int = 4096,
    image_share: float = 0.5,
) -> Proposal:
    """Deal a model's layers out over pipeline stages.

    Args:
        hf_dir: the Hugging Face folder; only headers are read.
        pp_size: pipeline ranks.
        vpp_size: virtual stages of each.
        tp_size: tensor-parallel size.
        tokens: text tokens of a micro batch, images included.
        image_share: part of the tokens that stand for images.

    Raises:
        ModelError: no converter knows the model.
        LayoutError: more stages than layers, or a tp_size that does not divide the heads.
    """
    hf = HuggingFaceFolder.open(hf_dir)
    names = converters_for(hf)
    if not names:
        raise ModelError(
            f"{hf.directory / 'config.json'} says model_type {hf.config.get('model_type')!r}; known:"
            f" {', '.join(t for family in CONVERTERS.values() for t in family.model_types)}"
        )
    if CONVERTERS[names[0]].generative:
        raise ModelError(
            f"{hf.directory} holds a generative model, whose blocks are alike: deal them out evenly by hand"
            " (pp_layers); auto weighs language layers against vision layers"
        )
    hf = hf.unstacked(CONVERTERS[names[0]].stacked)
    layers = _loads(Converter.named(names[0]), hf, pp_size, tokens, image_share)
    vit = sum(part == "vit" for part, _ in layers)
    stages = pp_size * vpp_size
    if stages > len(layers):
        raise LayoutError(f"{pp_size} x {vpp_size} stages for {len(layers)} layers; at most {len(layers)} are possible")
    bounds = _balanced([load for _, load in layers], stages, pp_size)
    llm_counts = [max(0, stop - max(start, vit)) for start, stop in bounds]
    vit_counts = [max(0, min(stop, vit) - start) for start, stop in bounds]
    llm_rows, vit_rows = (
        tuple(tuple(counts[v * pp_size : (v + 1) * pp_size]) for v in range(vpp_size))
        for counts in (llm_counts, vit_counts)
    )
    layout = Layout(llm_pp_layers=llm_rows, vit_pp_layers=vit_rows, tp_size=tp_size)
    Converter.named(names[0]).sizes(hf).check(layout)
    ranks = _ranks([load for _, load in layers], bounds, layout)
    return Proposal(layout=layout, ranks=ranks, reasons=_reasons(ranks), line=_line(names[0], hf_dir, layout))


def _loads(
    converter: Converter, hf: HuggingFaceFolder, pp_size: int, tokens: int, image_share: float
) -> list[tuple[Part, _Load]]:
    """Vision layers, then language layers, in the order in which data runs; what stands beside the first or the last
    layer of a part counts with it."""
    sizes = converter.sizes(hf)
    if sizes.audio_layers:
        raise ModelError("the work of an audio part is not estimated; give audio_pp_layers and the others by hand")
    found = by_canonical_name(converter.family, hf.tensors)
    counts: dict[Part, int] = {"vit": sizes.vit_layers, "llm": sizes.llm_layers}
    passing: dict[Part, float] = {"vit": tokens * image_share * PATCHES, "llm": tokens}
    loads = {part: [_Load()] * count for part, count in counts.items()}
    for rule in converter.family.rules(sizes, pp_size):
        count = counts[rule.part]
        ends = {"first": [0], "start": [0], "last": [count - 1], "end": [count - 1], "layer": list(range(count))}
        for i in ends[rule.where] if isinstance(rule.where, str) else [rule.where]:
            experts = range(sizes.experts if "{x}" in rule.hf[0] else 1)
            names = [name.format(i=i, x=x) for x in experts for name in rule.hf]
            specs = [hf.tensors[found[name]] for name in names if name in found]
            # An embedding is looked up, not multiplied by.
            lookup = "word_embeddings" in rule.mm
            share = sizes.experts_per_token / sizes.experts if len(experts) > 1 else 1
            loads[rule.part][i] += _load(specs, passing[rule.part] * share, multiplied=not lookup)
    return [(part, load) for part in ("vit", "llm") for load in loads[part]]


def _load(specs: list[Spec], passing: float, *, multiplied: bool) -> _Load:
    parameters = sum(prod(spec.shape) for spec in specs)
    matrices = [spec for spec in specs if len(spec.shape) > 1 and multiplied]
    # A matrix keeps what it was multiplied by, and what it made is kept by what comes next.
    kept = sum((spec.shape[0] + prod(spec.shape[1:])) * BYTES[spec.dtype] for spec in matrices)
    return _Load(parameters, sum(prod(spec.shape) for spec in matrices) * passing, kept * passing)


def _balanced(loads: list[_Load], stages: int, pp_size: int) -> list[tuple[int, int]]:
    """Cut the layers into stages so that the costliest stage costs as little as possible, and among such cuts the one
    whose stages are most alike (least sum of squares)."""
    whole = sum(loads, _Load())
    memory = whole.parameters * TRAINING_BYTES + whole.activations * (pp_size + 1) / 2
    work, weights, activations = (
        list(accumulate(values, initial=0.0))
        for values in (
            [load.work / whole.work for load in loads],
            [load.parameters * TRAINING_BYTES / memory for load in loads],
            [load.activations / memory for load in loads],
        )
    )

    def cost(stage: int, start: int, stop: int) -> float:
        held = weights[stop] - weights[start]
        held += (activations[stop] - activations[start]) * (pp_size - stage % pp_size)
        return max(work[stop] - work[start], held)

    worst = max(cost(s, *bounds) for s, bounds in enumerate(_cut(len(loads), stages, cost, max)))
    limit = worst * (1 + 1e-9)
    return _cut(len(loads), stages, cost, lambda before, own: before + own**2 if own <= limit else inf)


def _cut(
    count: int, stages: int, cost: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> list[tuple[int, int]]:
    """The cheapest way to cut `count` layers into so many stages, none of them empty.

    Args:
        count: number of layers.
        stages: number of stages.
        cost: of a stage from a layer to another.
        join: the cost of a cut, from that of the stages before and that of its last stage.
    """
    # What the cheapest cut of the first `stop` layers into the stages so far costs, and where its last stage begins.
    best = [0.0] + [inf] * count
    begins: list[list[int]] = []
    for stage in range(stages):
        now, begin = [inf] * (count + 1), [0] * (count + 1)
        for stop in range(stage + 1, count - (stages - stage - 1) + 1):
            for start in range(stage, stop):
                value = join(best[start], cost(stage, start, stop))
                if value < now[stop]:
                    now[stop], begin[stop] = value, start
        best = now
        begins.append(begin)
    bounds = []
    stop = count
    for begin in reversed(begins):
        bounds.append((begin[stop], stop))
        stop = begin[stop]
    return bounds[::-1]


def _ranks(loads: list[_Load], bounds: list[tuple[int, int]], layout: Layout) -> tuple[RankLoad, ...]:
    whole = sum(loads, _Load())
    made = []
    for rank in range(layout.pp_size):
        held = sum((load for start, stop in bounds[rank :: layout.pp_size] for load in loads[start:stop]), _Load())
        memory = held.parameters * TRAINING_BYTES + held.activations * (layout.pp_size - rank)
        made.append(
            RankLoad(
                llm_layers=sum(row[rank] for row in layout.llm_pp_layers),
                vit_layers=sum(row[rank] for row in layout.vit_pp_layers),
                parameters=held.parameters,
                work=held.work / whole.work,
                memory_bytes=round(memory / layout.tp_size),
            )
        )
    return tuple(made)


def _reasons(ranks: tuple[RankLoad, ...]) -> tuple[str, ...]:
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].work)
    fullest = max(range(len(ranks)), key=lambda rank: ranks[rank].memory_bytes)
    idle = 1 - 1 / (len(ranks) * ranks[slowest].work)
    return (
        f"Rank {slowest} works longest ({ranks[slowest].work:.1%}; even would be {1 / len(ranks):.1%}): others wait"
        f" {idle:.0%} of the time for it. Rank {fullest} is fullest ({ranks[fullest].memory_bytes / 2**30:.1f} GiB).",
        "Work: parameters times the tokens that pass them; the embedding is looked up, the output layer multiplied.",
        "Memory: 18 bytes a parameter, and the activations of the micro batches in flight, more on earlier ranks.",
    )


def _line(converter: str, hf_dir: str | Path, layout: Layout) -> str:
    def text(lists: tuple[tuple[int, ...], ...]) -> str:
        return str([list(row) for row in lists]).replace(" ", "")

    return (
        f"mm-convert {converter} hf_to_mm --cfg.mm_dir MM --cfg.hf_config.hf_dir {quote(str(hf_dir))}"
        f" --cfg.parallel_config.llm_pp_layers {text(layout.llm_pp_layers)}"
        f" --cfg.parallel_config.vit_pp_layers {text(layout.vit_pp_layers)}"
        f" --cfg.parallel_config.tp_size {layout.tp_size}"
    )
