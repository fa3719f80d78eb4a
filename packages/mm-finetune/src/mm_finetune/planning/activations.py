"""What a forward pass leaves for the backward pass, tensor by tensor, and what either needs for a moment.

Listed from the engine (``layers.py``, ``pointwise.py``, ``attention.py``, ``adapters.py``, ``loss.py``), from what it
takes of megatron-core (``ColumnParallelLinear``, ``RowParallelLinear``, ``CheckpointFunction``) and from
transformers' vision blocks; a test compares the sums with the storages that autograd really keeps and with what torch
allocates. All sizes are bytes of one micro-batch on one rank, which holds all its tokens, or
between the layers' cut parts, where sequence parallelism cuts them, one in tp_size.

A product ``x W`` keeps x where W trains or has an adapter, and nothing where it is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.load import Load
from mm_finetune.planning.weights import EMBEDDING, OUTPUT, Training, fused

# Of engine/loss.py, which needs torch to be imported: logits are made of this many positions at a time.
LOSS_CHUNK = 1024
FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What differs from device to device.

    Attributes:
        varlen: attention over samples of different lengths is one call; otherwise it is one for each run of equal ones,
            and their results are joined into another tensor.
        sums: bytes that attention keeps of each query's softmax, a head.
        foreach: torch's AdamW works on all weights at once.
        copies: gradients are copied while they are summed over ranks, and bfloat16 numbers that are added to float32.
    """

    varlen: bool = True
    sums: int = FLOAT
    foreach: bool = True
    copies: bool = False


KERNELS = {
    "cuda": Kernels(),
    # npu_fusion_attention gives maximum and sum, each eight times over (the vendor's document of the operator).
    "npu": Kernels(sums=2 * 8 * FLOAT),
    # gloo has no reduce-scatter in place, and torch on a CPU no sum of two types.
    "cpu": Kernels(varlen=False, foreach=False, copies=True),
}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one part of the model for one micro-batch.

    Attributes:
        saved: kept from its forward to its backward pass.
        again: kept anew while it is computed again (recomputation), for one layer at a time.
        moment: gradients and other things that stand beside it at the beginning of its backward pass.
    """

    saved: float = 0
    again: float = 0
    moment: float = 0


class Decoder:
    """The decoder layers of a rank.

    Args:
        architecture: of the model.
        training: precision, recomputation, what trains.
        tp_size: tensor-parallel size.
        sequence_parallel: tokens are cut between the layers' cut parts.
        load: the micro-batch.
        kernels: of the device.
    """

    def __init__(
        self,
        architecture: Architecture,
        training: Training,
        tp_size: int,
        *,
        sequence_parallel: bool,
        load: Load,
        kernels: Kernels,
    ) -> None:
        self.architecture, self.training, self.kernels, self.load = architecture, training, kernels, load
        self.element, self.tp_size = training.element, tp_size
        self.tokens = load.tokens
        self.own_tokens = load.tokens / tp_size if sequence_parallel else load.tokens
        self.cut = sequence_parallel and tp_size > 1
        self.hidden = self.own_tokens * architecture.hidden * self.element
        self.queries = self.tokens * architecture.hidden / tp_size * self.element
        self.keys = self.tokens * architecture.kv_heads * architecture.head_dim / tp_size * self.element
        self.inner = self.tokens * architecture.ffn / tp_size * self.element
        self._known: dict[int, Kept] = {}

    def layer(self, number: int) -> Kept:
        """One layer."""
        if number not in self._known:
            self._known[number] = self._layer([published for published, _ in fused(number)])
        return self._known[number]

    def _layer(self, names: list[list[str]]) -> Kept:
        _, qkv, _, proj, _, fc1, fc2 = names
        attention = self._norm() + self._column(qkv) + self._attention() + self._row(proj)
        mlp_norm, mlp_input = self._norm(), self._column(fc1)
        # fc1's output: both halves; their product is fc2's input.
        mlp = 2 * self.inner + self._row(fc2, self.inner)
        whole = attention + mlp_norm + mlp_input + mlp
        # Gradients of fc2's input, of both halves and a product on the way; of the layer's output, for two ways.
        moment = 4 * self.inner + 2 * self.hidden
        if self.training.recompute == "full":
            return Kept(saved=self.hidden, again=whole - self.hidden, moment=moment)
        if self.training.recompute == "selective":
            kept = attention + mlp_norm + self.hidden
            return Kept(saved=kept, again=mlp + max(0.0, mlp_input - self.hidden), moment=moment)
        return Kept(saved=whole, moment=moment)

    def final_norm(self) -> float:
        """In front of the output layer."""
        return self._norm()

    def _norm(self) -> float:
        """Its input, and the reciprocal root of each token."""
        return self.hidden + self.own_tokens * FLOAT

    def _column(self, names: list[str]) -> float:
        """A product cut along its outputs: its input, and what its adapters keep."""
        adapters = self._adapters(names)
        kept = self.hidden if self.training.trains(*names) or (adapters and not self.training.dropout) else 0
        kept += self._dropped(self.hidden) * len(adapters)
        return kept + sum(self.tokens * rank * self.element for rank in adapters)

    def _row(self, names: list[str], inputs: float | None = None) -> float:
        """A product cut along its inputs; None: they are kept already, by attention."""
        adapters = self._adapters(names)
        size = self.queries if inputs is None else inputs
        wanted = self.training.trains(*names) or (adapters and not self.training.dropout)
        # Results of several calls are joined: that is a tensor of its own.
        joined = inputs is not None or (self.load.pieces and not self.kernels.varlen)
        kept = size if wanted and joined else 0
        kept += self._dropped(size) * len(adapters)
        return kept + sum(self.own_tokens * rank * self.element for rank in adapters)

    def _dropped(self, size: float) -> float:
        """What an adapter's dropout keeps: which inputs, and what is left of them."""
        return 2 * size if self.training.dropout else 0

    def _adapters(self, names: list[str]) -> list[int]:
        layers = self.training.adapts(*(name.removesuffix(".weight") for name in names))
        return [self.training.adapters[layer] for layer in layers if self.training.adapter_trains(layer)]

    def _attention(self) -> float:
        """Queries, keys, values, results, and of each softmax what the kernel keeps.

        Values are a view of the fused product's output. Where rows lie one below the other, they are copied.
        """
        values = self.keys if self.load.rows > 1 else self.queries + 2 * self.keys
        sums = self.tokens * self.architecture.heads / self.tp_size * self.kernels.sums
        return 2 * self.queries + self.keys + values + sums

    def positions(self) -> float:
        """Cosines and sines of M-RoPE, once for all layers of a chunk."""
        return 2 * self.tokens * self.architecture.head_dim * FLOAT

    def loss(self) -> tuple[float, float]:
        """The output layer and the loss: what is kept until the backward pass, and what it needs besides, at most.

        Kept is the gradient of the hidden states, and that of the output layer in float32 where it trains.
        """
        training, vocabulary = self.training, self.architecture.vocabulary / self.tp_size
        loss_tokens = self.load.loss_tokens
        states = loss_tokens * self.architecture.hidden * self.element
        weight = vocabulary * self.architecture.hidden
        trained = training.trains(EMBEDDING if self.architecture.tied else OUTPUT)
        kept = states + (weight * FLOAT if trained else 0)
        # Logits in float32, and their gradient rounded where weights are bfloat16; the chunk's part of the gradient.
        rounded = training.element if training.element < FLOAT else 0
        chunk = min(LOSS_CHUNK, loss_tokens) * vocabulary * (FLOAT + rounded)
        # Those of a chunk are let go when those of the next one are there.
        several = chunk if loss_tokens > LOSS_CHUNK else 0
        product = weight * (rounded + (FLOAT if rounded and self.kernels.copies else 0)) if trained else 0
        # The last layer's output, its norm, and where tokens are cut those of all ranks.
        gathered = self.hidden + self.tokens * self.architecture.hidden * self.element * (1 + self.cut)
        return kept, gathered + states + max(chunk + max(product, several), weight * training.element if trained else 0)


class Tower:
    """The vision tower, whole on each rank of the first stage.

    Args:
        architecture: of the model.
        training: precision, recomputation, what trains.
        load: the micro-batch.
        kernels: of the device.
    """

    def __init__(self, architecture: Architecture, training: Training, *, load: Load, kernels: Kernels) -> None:
        self.vision, self.training, self.kernels = architecture.vision, training, kernels
        self.patches, self.element, self.load = load.patches, training.element, load
        self.row = self.patches * self.vision.width * self.element
        self.wide = self.patches * self.vision.inner * self.element

    def kept(self) -> Kept:
        """All of it. What lies below everything that trains keeps nothing."""
        patch_embed = "visual.patch_embed.proj.weight"
        flows = self._trained(patch_embed)
        # In float32 the pixels of the micro-batch themselves.
        cast = flows and self.element < FLOAT
        saved = float(self.patches * self.vision.patch * self.element) if cast else 0.0
        again = 0.0
        full = self.training.recompute == "full"
        for number in range(self.vision.depth):
            flows = flows or self._trained(*self._of(f"visual.blocks.{number}."))
            if flows:
                block = self._block(f"visual.blocks.{number}.")
                saved += self.row if full else block
                again = max(again, block) if full else 0
        rotary = 2 * self.patches * self.vision.width / self.vision.heads * FLOAT if flows else 0
        flows = flows or self._trained(*self._of("visual.merger."))
        saved += rotary + (self._merger() if flows else 0)
        return Kept(saved=saved, again=again, moment=4 * self.wide + 2 * self.row if flows else 0)

    def _of(self, prefix: str) -> list[str]:
        return [name for name in self.training.rates if name.startswith(prefix)]

    def _trained(self, *names: str) -> bool:
        """Whether any of some weights trains, or the adapter of one."""
        adapters = self._adapters(*names)
        return bool(adapters) or (not self.training.adapters and any(self.training.rates[name] for name in names))

    def _adapters(self, *names: str) -> list[int]:
        layers = self.training.adapts(*(name.removesuffix(".weight") for name in names))
        return [self.training.adapters[layer] for layer in layers if self.training.adapter_trains(layer)]

    def _block(self, name: str) -> float:
        vision = self.vision
        attention = self._norm() + self._linear(f"{name}attn.qkv", self.row)
        # Queries and keys, rotated; values are a view of the fused product's output; results, sums of the softmaxes.
        attention += 2 * self.row + 3 * self.row + self.row + self.patches * vision.heads * self.kernels.sums
        attention += self._linear(f"{name}attn.proj", self.row, held=not self._joins)
        mlp = self._norm()
        if vision.gated:
            halves = ("gate_proj", "up_proj")
            kept = any(self._keeps(f"{name}mlp.{half}") for half in halves)
            mlp += (self.row if kept else 0) + sum(self._extra(f"{name}mlp.{half}", self.row) for half in halves)
            # The gate, its silu, the other half; their product is the input of the last layer.
            return attention + mlp + 3 * self.wide + self._linear(f"{name}mlp.down_proj", self.wide)
        # GELU as x sigmoid(1.702 x): x and the sigmoid.
        mlp += self._linear(f"{name}mlp.fc1", self.row) + 2 * self.wide
        return attention + mlp + self._linear(f"{name}mlp.fc2", self.wide)

    @property
    def _joins(self) -> bool:
        return self.load.pieces and not self.kernels.varlen

    def _norm(self) -> float:
        """Its input, and the reciprocal root of each patch; Qwen2-VL's layer norm keeps a mean too."""
        return self.row + self.patches * FLOAT * (1 if self.vision.gated else 2)

    def _keeps(self, layer: str) -> bool:
        """Whether a product keeps its input: its own weight trains, or an adapter that sees it as it is."""
        name = f"{layer}.weight"
        if self.training.adapters:
            return bool(self._adapters(name)) and not self.training.dropout
        return self._trained(name)

    def _extra(self, layer: str, size: float) -> float:
        """What an adapter keeps besides."""
        adapters = self._adapters(f"{layer}.weight")
        dropped = 2 * size if self.training.dropout else 0
        return sum(self.patches * rank * self.element + dropped for rank in adapters)

    def _linear(self, layer: str, size: float, *, held: bool = False) -> float:
        return (size if self._keeps(layer) and not held else 0) + self._extra(layer, size)

    def _merger(self) -> float:
        """The norm; four patches side by side: the input of the first layer, its output, GELU's."""
        name = "visual.merger."
        first, last = self._linear(f"{name}mlp.0", self.row), self._linear(f"{name}mlp.2", self.row)
        return self._norm() + first + self.row + last
