"""The weights that a process holds, which of them train, and the bytes of their gradients and optimizer state.

Formulas, for ``n`` numbers that train, in bytes:

* weights: 4 in float32, 2 in bfloat16, frozen ones too;
* gradients: ``4 n``: Megatron's buffer of ``main_grad`` is float32 (``grad_reduce_in_fp32``);
* optimizer: Adam's two moments, ``8 n``, and in bfloat16 the float32 weights, ``4 n``; with the distributed optimizer
  over the number of data-parallel ranks. In float32 the weights that the optimizer changes are the model's own.

With the distributed optimizer each weight begins at a multiple of 64 numbers of the buffer, and a bucket ends at one of
128 and of the ranks (Megatron's ``_ParamAndGradBuffer``); weights that train lie in such a buffer too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import lcm, prod
from typing import TYPE_CHECKING

from mm_finetune.errors import ConfigError
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.megatron import PATCH_EMBEDDING, Cut, Fused, Part, decoder_layer, merger, vision_layer
from mm_finetune.selection import adapted_layers, common_rate, rates_of, saved_layers

if TYPE_CHECKING:
    from mm_finetune.config import TrainConfig

ALIGNED, BUCKET = 64, 128
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run asks of the weights.

    Attributes:
        element: bytes of a number in weights and activations.
        distributed: the distributed optimizer is on.
        recompute: none, selective or full.
        rates: the factor of each published weight's learning rate; 0 is frozen.
        adapters: rank of the adapter on each published layer that has one.
        dropout: of the adapters.
        saved: the published weights that train beside adapters.
    """

    element: int
    distributed: bool
    recompute: str
    rates: Mapping[str, float]
    adapters: Mapping[str, int] = field(default_factory=dict)
    dropout: bool = False
    saved: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: TrainConfig, architecture: Architecture) -> Training:
        """From the configuration of a run.

        Raises:
            ConfigError: a pattern matches nothing, or nothing is left to train.
        """
        train, lora, shapes = config.train, config.lora, architecture.shapes()
        rates = rates_of(list(shapes), freeze=train.freeze, lr_scale=train.lr_scale)
        in_full = saved_layers(shapes, lora.modules_to_save) if lora else []
        saved = frozenset(name for name in shapes if name.rpartition(".")[0] in in_full)
        layers = adapted_layers(shapes, lora.target_modules, in_full) if lora else []
        if lora and not any(rates[name] for name in (*saved, *(f"{layer}.weight" for layer in layers))):
            raise ConfigError("nothing is left to train: train.freeze and train.lr_scale cover every adapted layer")
        return cls(
            element=2 if train.dtype == "bf16" else 4,
            distributed=train.distributed_optimizer,
            recompute=train.recompute,
            rates=rates,
            adapters=dict.fromkeys(layers, lora.r) if lora else {},
            dropout=bool(lora and lora.dropout),
            saved=saved,
        )

    def trains(self, *published: str) -> bool:
        """Whether a weight of the engine, of one or several published ones, trains itself.

        Raises:
            ConfigError: the published ones have different factors.
        """
        if published not in self._known:
            whole = not self.adapters or published[0] in self.saved
            self._known[published] = whole and common_rate(published[0], published, self.rates) > 0
        return self._known[published]

    @cached_property
    def _known(self) -> dict[tuple[str, ...], bool]:
        return {}

    def adapts(self, *layers: str) -> list[str]:
        """Those of some published layers that have an adapter."""
        return [layer for layer in layers if layer in self.adapters]

    def adapter_trains(self, layer: str) -> bool:
        """Whether the adapter of a layer trains."""
        return self.rates[f"{layer}.weight"] > 0

    def ranks(self, fused: Fused) -> list[int]:
        """Of the adapters that train on the layers in a weight."""
        return [self.adapters[layer] for layer in self.adapts(*fused.layers) if self.adapter_trains(layer)]

    def moves(self, part: Part) -> bool:
        """Whether any weight of a part trains, or the adapter of one."""
        return any(self.ranks(fused) or self.trains(*fused.published) for fused in part.values())


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of the engine on one rank.

    Attributes:
        numel: numbers on this rank.
        trained: it has a gradient.
        inner: it is neither embedding nor output layer.
        shared: it is the embedding that the output layer shares, with a bucket of its own.
    """

    numel: int
    trained: bool
    inner: bool = True
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of a rank that do not depend on the data.

    Attributes:
        largest: of the gradient of a single weight, which stands beside the buffer for a moment.
        largest_inner: the same without embedding and output layer.
        step: what the optimizer takes while it steps.
    """

    weights: int
    gradients: int
    optimizer: int
    largest: int
    largest_inner: int
    step: int


class Inventory:
    """The weights of the parts of a model.

    Args:
        architecture: of the model.
        training: what trains.
        tp_size: tensor-parallel size.
        vit_tp_size: of the vision tower, the same or 1; 0: the same.
    """

    def __init__(self, architecture: Architecture, training: Training, tp_size: int, vit_tp_size: int = 0) -> None:
        self.architecture, self.training, self.tp_size = architecture, training, tp_size
        self.vit_tp_size = vit_tp_size or tp_size
        self.shapes = architecture.shapes()

    def layer(self, number: int) -> list[Weight]:
        """A decoder layer."""
        return self._part(decoder_layer(number), self.tp_size)

    def patch_embedding(self) -> list[Weight]:
        """The vision tower's first layer."""
        return self._part(PATCH_EMBEDDING, self.vit_tp_size)

    def vision_layer(self, number: int) -> list[Weight]:
        """A layer of the vision tower."""
        return self._part(vision_layer(number, gated=self.architecture.vision.gated), self.vit_tp_size)

    def merger(self) -> list[Weight]:
        """The merger behind the last of them."""
        return self._part(merger(gated=self.architecture.vision.gated), self.vit_tp_size)

    def embedding(self, *, copied: bool) -> list[Weight]:
        """The embedding; with a copy on the last stage it has a bucket of its own."""
        return [self._weight(Fused((EMBEDDING,), "outputs"), self.tp_size, shared=copied)]

    def output(self, *, copied: bool) -> list[Weight]:
        """Final norm and output layer; a tied one is the embedding where that stands here too, or a copy of it."""
        norm = self._weight(Fused(("model.norm.weight",)), self.tp_size)
        if not self.architecture.tied:
            return [norm, self._weight(Fused((OUTPUT,), "outputs"), self.tp_size)]
        return [norm, *self.embedding(copied=True)] if copied else [norm]

    def _part(self, part: Part, tp_size: int) -> list[Weight]:
        found: list[Weight] = []
        for fused in part.values():
            found.append(self._weight(fused, tp_size))
            for layer in self.training.adapts(*fused.layers):
                found += self._adapter(layer, tp_size, fused.cut)
        return found

    def _weight(self, fused: Fused, tp_size: int, *, shared: bool = False) -> Weight:
        numel = sum(prod(self.shapes[name]) for name in fused.published)
        return Weight(
            numel=numel // tp_size if fused.cut else numel,
            trained=self.training.trains(*fused.published),
            inner=fused.published[0] not in (EMBEDDING, OUTPUT),
            shared=shared,
        )

    def _adapter(self, layer: str, tp_size: int, cut: Cut | None) -> list[Weight]:
        outputs, inputs = self.shapes[f"{layer}.weight"]
        rank, trained = self.training.adapters[layer], self.training.adapter_trains(layer)
        outputs //= tp_size if cut == "outputs" else 1
        inputs //= tp_size if cut == "inputs" else 1
        return [Weight(numel=rank * inputs, trained=trained), Weight(numel=outputs * rank, trained=trained)]


def states(chunks: Sequence[Iterable[Weight]], training: Training, dp_size: int, *, roots: bool) -> States:
    """Bytes of the weights of a rank's chunks, their gradients and optimizer state.

    Args:
        chunks: of the rank; each has a buffer of its own.
        training: precision and optimizer.
        dp_size: data-parallel size.
        roots: while it steps, the optimizer takes another float32 number for each weight, the root of its second
            moment.
    """
    held = [list(chunk) for chunk in chunks]
    frozen = sum(weight.numel for chunk in held for weight in chunk if not weight.trained)
    trained = sum(_buffer(chunk, training, dp_size) for chunk in held)
    shard = trained // dp_size if training.distributed else trained
    state = 8 if training.element == 4 else 12
    largest = max((w.numel for chunk in held for w in chunk if w.trained), default=0)
    inner = max((w.numel for chunk in held for w in chunk if w.trained and w.inner), default=0)
    return States(
        weights=(frozen + trained) * training.element,
        gradients=trained * 4,
        optimizer=shard * state,
        largest=largest * training.element,
        largest_inner=inner * training.element,
        step=4 * shard if roots else 0,
    )


def _buffer(weights: list[Weight], training: Training, dp_size: int) -> int:
    """Numbers in Megatron's buffer of a chunk."""
    trained = [weight for weight in weights if weight.trained]
    if not training.distributed:
        return sum(weight.numel for weight in trained)
    bucket = lcm(dp_size, BUCKET)
    ordinary = sum(_up(weight.numel, ALIGNED) for weight in trained if not weight.shared)
    own = sum(_up(weight.numel, bucket) for weight in trained if weight.shared)
    return _up(ordinary, bucket) + own


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
