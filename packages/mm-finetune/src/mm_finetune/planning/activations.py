"""What a forward pass leaves for the backward pass, tensor by tensor, and what either needs for a moment.

Listed from the engine (``layers.py``, ``pointwise.py``, ``attention.py``, ``adapters.py``, ``loss.py``, ``vision.py``)
and from what it takes of megatron-core (``ColumnParallelLinear``, ``RowParallelLinear``, ``CheckpointFunction``); a
test compares the sums with the storages that autograd really keeps and with what torch allocates. All sizes are bytes
of one micro-batch on one rank, which holds all its tokens, or between the layers' cut parts, where sequence parallelism
cuts them, one in tp_size.

A product ``x W`` keeps x where W trains or has an adapter, and nothing where it is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.load import Load
from mm_finetune.planning.megatron import (
    FC1,
    FC2,
    PATCH_EMBEDDING,
    PROJ,
    QKV,
    Fused,
    Part,
    decoder_layer,
    merger,
    vision_layer,
)
from mm_finetune.planning.weights import EMBEDDING, OUTPUT, Training

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
        roots: torch's AdamW takes the roots of all second moments at once; where it has a kernel of one pass
            (``FUSED_ADAMW`` of engine/step.py), of none.
        copies: gradients are copied while they are summed over ranks, and bfloat16 numbers that are added to float32.
    """

    varlen: bool = True
    sums: int = FLOAT
    roots: bool = False
    copies: bool = False


KERNELS = {
    "cuda": Kernels(),
    # npu_fusion_attention gives maximum and sum, each eight times over (the vendor's document of the operator).
    "npu": Kernels(sums=2 * 8 * FLOAT, roots=True),
    # gloo has no reduce-scatter in place, and torch on a CPU no sum of two types.
    "cpu": Kernels(varlen=False, copies=True),
}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one part of the model for one micro-batch.

    Attributes:
        saved: kept from its forward to its backward pass.
        again: kept anew while it is computed again (recomputation), for one layer at a time.
        moment: gradients and other things that stand beside it at the beginning of its backward pass.
        begin: what its forward pass takes for a moment, when little of `saved` is there yet.
    """

    saved: float = 0
    again: float = 0
    moment: float = 0
    begin: float = 0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What goes through layers of one kind on one rank, for one micro-batch; bytes but for the numbers.

    Attributes:
        tokens: number that goes through the cut parts; of the vision tower, patches.
        own_tokens: number that goes through what lies between them.
        hidden: input of a layer.
        queries: of all heads of this rank.
        keys: likewise.
        inner: input of the MLP's last product.
        heads: number, on this rank.
        rows: number of rows that lie one below the other.
        roots: float32 numbers that a norm keeps of each token.
    """

    tokens: float
    own_tokens: float
    hidden: float
    queries: float
    keys: float
    inner: float
    heads: float
    rows: int
    roots: int = 1


class Layers:
    """Megatron's layers of one kind on a rank: the language model's, or the vision tower's.

    Args:
        sizes: of what goes through.
        training: precision, recomputation, what trains.
        kernels: of the device.
        pieces: see :class:`mm_finetune.planning.load.Load`.
        part: the weights of a layer by its number.
    """

    def __init__(
        self, sizes: Sizes, training: Training, kernels: Kernels, *, pieces: bool, part: Callable[[int], Part]
    ) -> None:
        self.sizes, self.training, self.kernels, self.part = sizes, training, kernels, part
        self.joins = pieces and not kernels.varlen
        self._known: dict[int, Kept] = {}

    def layer(self, number: int) -> Kept:
        """One layer."""
        if number not in self._known:
            self._known[number] = self._layer(self.part(number))
        return self._known[number]

    def _layer(self, part: Part) -> Kept:
        sizes = self.sizes
        attention = self.norm() + self.column(part[QKV], sizes.hidden) + self._attention()
        # Its input is kept already, by attention, unless results of several calls are joined: in a tensor of its own.
        attention += self.row(part[PROJ], sizes.queries, held=not self.joins)
        mlp_norm, mlp_input = self.norm(), self.column(part[FC1], sizes.hidden)
        # What the activation is made of: both halves, or of one a factor too. Its result is the next one's input.
        mlp = 2 * sizes.inner + self.row(part[FC2], sizes.inner)
        whole = attention + mlp_norm + mlp_input + mlp
        # Gradients of fc2's input, of both halves and a product on the way; of the layer's output, for two ways.
        moment = 4 * sizes.inner + 2 * sizes.hidden
        if self.training.recompute == "full":
            return Kept(saved=sizes.hidden, again=whole - sizes.hidden, moment=moment)
        if self.training.recompute == "selective":
            kept = attention + mlp_norm + sizes.hidden
            return Kept(saved=kept, again=mlp + max(0.0, mlp_input - sizes.hidden), moment=moment)
        return Kept(saved=whole, moment=moment)

    def norm(self) -> float:
        """Its input, and the reciprocal root of each token; a layer norm keeps a mean too."""
        return self.sizes.hidden + self.sizes.own_tokens * self.sizes.roots * FLOAT

    def column(self, fused: Fused, inputs: float) -> float:
        """A product cut along its outputs: its input, and what its adapters keep."""
        return self._product(fused, inputs, self.sizes.tokens, held=False)

    def row(self, fused: Fused, inputs: float, *, held: bool = False) -> float:
        """A product cut along its inputs.

        Args:
            fused: its weight.
            inputs: bytes.
            held: they are kept by another.
        """
        return self._product(fused, inputs, self.sizes.own_tokens, held=held)

    def _product(self, fused: Fused, inputs: float, tokens: float, *, held: bool) -> float:
        training, adapters = self.training, self.training.ranks(fused)
        wanted = training.trains(*fused.published) or (adapters and not training.dropout)
        # Of dropout: which inputs, and what is left of them.
        dropped = 2 * inputs * len(adapters) if training.dropout else 0
        reduced = sum(tokens * rank * training.element for rank in adapters)
        return (inputs if wanted and not held else 0) + dropped + reduced

    def _attention(self) -> float:
        """Queries, keys, values, results, and of each softmax what the kernel keeps.

        Values are a view of the fused product's output. Where rows lie one below the other, they are copied.
        """
        sizes = self.sizes
        values = sizes.keys if sizes.rows > 1 else sizes.queries + 2 * sizes.keys
        return 2 * sizes.queries + sizes.keys + values + sizes.tokens * sizes.heads * self.kernels.sums


class Decoder:
    """The language model of a rank.

    Args:
        architecture: of the model.
        training: precision, recomputation, what trains.
        tp_size: tensor-parallel size.
        sequence_parallel: tokens are cut between the layers' cut parts.
        load: the micro-batch.
        kernels: of the device.

    Attributes:
        hidden: bytes of what a layer gives to the next one.
        layers: its layers.
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
        self.tp_size, self.cut = tp_size, sequence_parallel and tp_size > 1
        tokens, own_tokens = load.tokens, load.tokens / (tp_size if self.cut else 1)
        self.hidden = own_tokens * architecture.hidden * training.element
        sizes = Sizes(
            tokens=tokens,
            own_tokens=own_tokens,
            hidden=self.hidden,
            queries=tokens * architecture.hidden / tp_size * training.element,
            keys=tokens * architecture.kv_heads * architecture.head_dim / tp_size * training.element,
            inner=tokens * architecture.ffn / tp_size * training.element,
            heads=architecture.heads / tp_size,
            rows=load.rows,
        )
        self.layers = Layers(sizes, training, kernels, pieces=load.pieces, part=decoder_layer)

    def final_norm(self) -> float:
        """In front of the output layer."""
        return self.layers.norm()

    def positions(self) -> float:
        """Cosines and sines of M-RoPE, once for all layers of a chunk."""
        return 2 * self.load.tokens * self.architecture.head_dim * FLOAT

    def loss(self) -> tuple[float, float]:
        """The output layer and the loss: what is kept until the backward pass, and what it needs besides, at most.

        Kept is the gradient of the hidden states, and that of the output layer in float32 where it trains.
        """
        training, vocabulary = self.training, self.architecture.vocabulary / self.tp_size
        loss_tokens = self.load.loss_tokens
        states = loss_tokens * self.architecture.hidden * training.element
        weight = vocabulary * self.architecture.hidden
        trained = training.trains(EMBEDDING if self.architecture.tied else OUTPUT)
        kept = states + (weight * FLOAT if trained else 0)
        # Logits in float32 beside their gradient, rounded where weights are bfloat16; then that beside the chunk's part
        # of the weight's gradient.
        rounded = training.element if training.element < FLOAT else 0
        logits = min(LOSS_CHUNK, loss_tokens) * vocabulary
        product = weight * (rounded + (FLOAT if rounded and self.kernels.copies else 0)) if trained else 0
        # The last layer's output, its norm, and where tokens are cut those of all ranks.
        gathered = self.hidden + self.load.tokens * self.architecture.hidden * training.element * (1 + self.cut)
        chunk = logits * rounded + max(logits * FLOAT, product)
        return kept, gathered + states + max(chunk, weight * training.element if trained else 0)


class Tower:
    """The vision tower of a rank. Its patches are whole on every tensor-parallel rank, its products are cut.

    Full recomputation is of its layers too; selective is of the language model's alone, as in ``engine/vision.py``. The
    merger is never computed again.

    Args:
        architecture: of the model.
        training: precision, recomputation, what trains.
        tp_size: tensor-parallel size of the tower.
        load: the micro-batch.
        kernels: of the device.

    Attributes:
        hidden: bytes of what a layer gives to the next one.
        features: bytes of what the merger gives to the language model.
    """

    def __init__(
        self, architecture: Architecture, training: Training, tp_size: int, *, load: Load, kernels: Kernels
    ) -> None:
        vision = self.vision = architecture.vision
        self.training, self.tp_size, self.patches = training, tp_size, load.patches
        self.hidden = self.patches * vision.width * training.element
        self.features = self.patches / vision.merge**2 * architecture.hidden * training.element
        sizes = Sizes(
            tokens=self.patches,
            own_tokens=self.patches,
            hidden=self.hidden,
            queries=self.hidden / tp_size,
            keys=self.hidden / tp_size,
            inner=self.patches * vision.inner / tp_size * training.element,
            heads=vision.heads / tp_size,
            rows=1,
            roots=1 if vision.gated else 2,
        )
        own = replace(training, recompute="full" if training.recompute == "full" else "none")
        self.layers = Layers(sizes, own, kernels, pieces=load.pieces, part=partial(vision_layer, gated=vision.gated))

    def kept(self, numbers: range, *, merges: bool) -> Kept:
        """Some of its layers, with the patch embedding and the merger where they stand.

        What lies below everything that trains keeps nothing.

        Args:
            numbers: of the layers; 0 has the patch embedding before it.
            merges: the merger stands behind them.
        """
        training, flows = self.training, self._flows_into(numbers.start)
        saved = again = moment = 0.0
        # The pixels, pictures' and videos' together: cast, if they are not float32, and before that.
        pixels = self.patches * self.vision.patch if numbers and numbers.start == 0 else 0
        uncast = pixels * FLOAT if training.element < FLOAT else 0
        saved += pixels * training.element if training.moves(PATCH_EMBEDDING) else 0
        alone = 0.0
        for number in numbers:
            flows, layer = flows or training.moves(self.layers.part(number)), self.layers.layer(number)
            if flows:
                saved, again, moment = saved + layer.saved, max(again, layer.again), layer.moment
            else:
                # Forwards fc1's outputs stand without and with bias, about as much as backwards.
                alone = max(alone, layer.moment)
        if numbers and flows:
            # Cosines and sines of the patches' places.
            saved += 2 * self.patches * self.vision.width / self.vision.heads * FLOAT
        if merges and (flows or training.moves(self._merger)):
            merged = self._merged()
            # All that the merger keeps is gone before a layer is computed again.
            saved, again, moment = saved + merged, max(0.0, again - merged), moment or 4 * self.hidden
        return Kept(saved=saved, again=again, moment=moment, begin=pixels * training.element + max(uncast, alone))

    def _flows_into(self, number: int) -> bool:
        """Whether anything below a layer trains; below the first one, the patch embedding."""
        below = (self.layers.part(each) for each in range(number))
        return self.training.moves(PATCH_EMBEDDING) or any(map(self.training.moves, below))

    @property
    def _merger(self) -> Part:
        return merger(gated=self.vision.gated)

    def _merged(self) -> float:
        """The norm; four patches side by side: the input of the first product, its output, GELU's."""
        wide = self.hidden / self.tp_size
        part, layers = self._merger, self.layers
        last = layers.row(part["encoder.linear_fc2.weight"], wide)
        return layers.norm() + layers.column(part["encoder.linear_fc1.weight"], self.hidden) + wide + last
