"""The arithmetic that a training step needs, for MFU (model FLOPs utilisation, arXiv 2204.02311, appendix B).

A product of ``[m, k]`` and ``[k, n]`` is ``2 m k n``. The backward pass of a product costs two more of them: one for
its input, one for its weights; a frozen weight saves the latter. So a trained weight costs six operations a token.
Attention is counted whole, as there, not halved for the causal mask. Counted is what the model needs: no padding, no
recomputation, no output layer where there is no loss, no norms and other work that grows with the width only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_finetune.data import Batch
    from mm_finetune.planning.architecture import Architecture
    from mm_finetune.planning.weights import Training


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that count.

    Attributes:
        linear: weights of the products of one decoder layer.
        attention: query heads times their width.
        vision_linear: weights of the products of one vision layer.
        patch: numbers in a patch.
        window: side of an attention window, in patches; 0: every layer sees the whole picture.
        full_layers: vision layers that see the whole picture.
        merge: side of the square of patches that becomes one token.
    """

    layers: int
    hidden: int
    linear: int
    attention: int
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_linear: int
    patch: int
    window: int
    full_layers: int
    merge: int

    @classmethod
    def of(cls, hf_config: Any) -> ModelShape:
        """From transformers' configuration of Qwen2.5-VL or Qwen2-VL."""
        text, vision = hf_config.text_config, hf_config.vision_config
        hidden, width = text.hidden_size, text.hidden_size // text.num_attention_heads
        heads, groups = text.num_attention_heads * width, text.num_key_value_heads * width
        windowed = hasattr(vision, "window_size")
        # Qwen2-VL calls the tower's width embed_dim, and its MLP has two matrices, not three.
        inner = vision.hidden_size if windowed else vision.embed_dim
        mlp = 3 * vision.intermediate_size if windowed else 2 * int(inner * vision.mlp_ratio)
        return cls(
            layers=text.num_hidden_layers,
            hidden=hidden,
            linear=hidden * (2 * heads + 2 * groups + 3 * text.intermediate_size),
            attention=heads,
            vocabulary=text.vocab_size,
            vision_layers=vision.depth,
            vision_hidden=inner,
            vision_linear=inner * (4 * inner + mlp),
            patch=3 * vision.temporal_patch_size * vision.patch_size**2,
            window=vision.window_size // vision.patch_size if windowed else 0,
            full_layers=len(vision.fullatt_block_indexes) if windowed else vision.depth,
            merge=vision.spatial_merge_size,
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What goes through the model.

    Attributes:
        lengths: tokens of each sample.
        grids: patches of each picture or video: in time, down, across.
        loss_tokens: tokens that carry loss.
    """

    lengths: Sequence[float]
    grids: Sequence[tuple[int, int, int]]
    loss_tokens: int

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Work:
        """What some micro-batches hold; samples that were padded together are taken as equally long."""
        lengths: list[float] = []
        grids: list[tuple[int, int, int]] = []
        loss_tokens = 0
        for batch in batches:
            bounds = getattr(batch, "cu_seqlens", None)
            rows = len(batch.input_ids)
            lengths += [batch.tokens / rows] * rows if bounds is None else bounds.diff().tolist()
            found = [getattr(batch, name, None) for name in ("image_grid_thw", "video_grid_thw")]
            grids += [(t, h, w) for grid in found if grid is not None for t, h, w in grid.tolist()]
            loss_tokens += int(batch.loss_mask.count_nonzero())
        return cls(lengths=lengths, grids=grids, loss_tokens=loss_tokens)


@dataclass(frozen=True, kw_only=True)
class Backward:
    """What the backward pass of a product costs, with its forward pass as the unit.

    Attributes:
        text: of the decoder's: one for the inputs, whose gradients pass through it in any case, and the share of its
            weights that train.
        vision: of the vision tower's likewise; 0 where nothing there trains.
    """

    text: float = 2.0
    vision: float = 2.0

    @classmethod
    def of(cls, training: Training, architecture: Architecture) -> Backward:
        """From what trains; adapters, which are small, count for the gradients that pass through their layers."""
        shapes = architecture.shapes()
        # An embedding of its own is no product; a tied one is the output layer's.
        lookup = set() if architecture.tied else {"model.embed_tokens.weight"}
        # The merger sees a token where the layers before it see the patches of its square.
        costs = {
            name: prod(shape) / (architecture.vision.merge**2 if name.startswith("visual.merger.") else 1)
            for name, shape in shapes.items()
            if len(shape) > 1 and name not in lookup
        }
        vision = {name for name in costs if name.startswith("visual.")}
        adapted = any(layer.startswith("visual.") and training.adapter_trains(layer) for layer in training.adapters)
        learns = adapted or any(training.trains(name) for name in shapes if name.startswith("visual."))

        def share(names: Set[str]) -> float:
            return sum(costs[name] for name in names if training.trains(name)) / sum(costs[name] for name in names)

        return cls(text=1 + share(costs.keys() - vision), vision=1 + share(vision) if learns else 0.0)


def step_flops(shape: ModelShape, work: Work, backward: Backward | None = None) -> float:
    """Floating point operations of a training step.

    Args:
        shape: the model.
        work: what goes through it.
        backward: the backward pass's cost; default: everything trains.
    """
    backward = backward or Backward()
    linear, attention = text_forward(shape, work)
    tower, tower_attention = vision_forward(shape, work)
    text = linear * (1 + backward.text) + attention * 3
    return text + tower * (1 + backward.vision) + tower_attention * (3 if backward.vision else 1)


def text_forward(shape: ModelShape, work: Work) -> tuple[float, float]:
    """Operations of a forward pass of the decoder: of its weights, and of attention."""
    tokens, squares = sum(work.lengths), sum(length**2 for length in work.lengths)
    linear = 2 * shape.layers * shape.linear * tokens + 2 * shape.hidden * shape.vocabulary * work.loss_tokens
    return linear, 4 * shape.layers * shape.attention * squares


def vision_forward(shape: ModelShape, work: Work) -> tuple[float, float]:
    """Operations of a forward pass of the vision tower and its merger: of their weights, and of attention."""
    hidden, unit = shape.vision_hidden, shape.merge**2
    patches = sum(t * h * w for t, h, w in work.grids)
    whole = sum(t * (h * w) ** 2 for t, h, w in work.grids)
    parts = sum(t * _windows(h, shape.window) * _windows(w, shape.window) for t, h, w in work.grids)
    squares = shape.full_layers * whole + (shape.vision_layers - shape.full_layers) * parts
    embedded = shape.patch * hidden + shape.vision_layers * shape.vision_linear
    merger = unit * hidden * (unit * hidden + shape.hidden)
    return 2 * patches * embedded + 2 * patches / unit * merger, 4 * hidden * squares


def _windows(side: int, window: int) -> int:
    """Sum of the squared lengths of the pieces that a side is cut into."""
    if not window:
        return side**2
    return side // window * window**2 + (side % window) ** 2
