"""The calls of one block of a diffusion transformer at a given shape, with what each must move and compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_fused_ops.attention import attention_forward
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.norms import RMSNorm, layernorm_scale_shift, residual_gate_norm_scale_shift
from dit_fused_ops.pointwise import residual_gate_add
from dit_fused_ops.rope import rotary_position_embedding

TEXT_TOKENS = 512  # of Wan's prompt, for cross-attention


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the tensors of a block are like: batch, tokens, heads, channels of a head."""

    batch: int
    tokens: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.heads}x{self.head_dim}"


# 81 frames of 832 × 480 and of 1280 × 720 are 21 latent frames of 30 × 52 and 45 × 80 tokens.
SHAPES: Mapping[str, Shape] = {
    "wan-1.3b-480p": Shape(batch=1, tokens=21 * 30 * 52, heads=12, head_dim=128),
    "wan-14b-480p": Shape(batch=1, tokens=21 * 30 * 52, heads=40, head_dim=128),
    "wan-14b-720p": Shape(batch=1, tokens=21 * 45 * 80, heads=40, head_dim=128),
}


def parse_shape(text: str) -> Shape:
    """Return the shape of a name in `SHAPES`, or of ``BATCHxTOKENSxHEADSxHEAD_DIM``.

    Raises:
        ParametersInvalid: it is neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split("x")
    sizes = [int(part) for part in parts if part.isascii() and part.isdigit() and int(part) > 0]
    if len(parts) != 4 or len(sizes) != 4 or sizes[3] % 2:
        raise ParametersInvalid(
            f"shape is {text!r}, legal are {', '.join(SHAPES)}, or four numbers BATCHxTOKENSxHEADSxHEAD_DIM with an "
            "even HEAD_DIM, such as 1x32760x12x128"
        )
    return Shape(batch=sizes[0], tokens=sizes[1], heads=sizes[2], head_dim=sizes[3])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    Attributes:
        op: the public function.
        what: which use of it.
        run: makes the call; keyword arguments go to the public function.
        moved: bytes that must be read and written at least.
        computed: floating point operations of the matrix products; 0 where memory is the limit.
    """

    op: str
    what: str
    run: Callable[..., Any]
    moved: int
    computed: int = 0


# The public functions of the calls below.
TUNED = (
    "rotary_position_embedding",
    "attention_forward",
    "rms_norm",
    "layernorm_scale_shift",
    "residual_gate_norm_scale_shift",
    "residual_gate_add",
)


def cases(shape: Shape, dtype: torch.dtype, device: torch.device, ops: frozenset[str] = frozenset()) -> Iterator[Case]:
    """Yield the calls of a Wan block, all or those of `ops`: rotation, both kinds of attention, norms and gates."""
    return (case for case in _cases(shape, dtype, device) if not ops or case.op in ops)


def _cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, kind)

    b, s, n, d = shape.batch, shape.tokens, shape.heads, shape.head_dim
    width = n * d
    stream = b * s * width * dtype.itemsize  # bytes of one tensor of the residual stream
    yield from _rotations(shape, random, stream)
    yield from _attentions(shape, random, stream)
    x, y = random(b, s, width), random(b, s, width)
    scale, shift, gate = (random(b, 1, width) for _ in range(3))
    norm, rms = nn.LayerNorm(width, 1e-6, elementwise_affine=False), RMSNorm(width).to(device, dtype)

    def gated(**how: Any) -> Any:
        return residual_gate_norm_scale_shift(norm, x, y, gate, scale, shift, **how)

    yield Case(op="rms_norm", what="queries", run=lambda **how: rms(x, **how), moved=2 * stream)
    yield Case(
        op="layernorm_scale_shift",
        what="modulated",
        run=lambda **how: layernorm_scale_shift(norm, x, scale, shift, **how),
        moved=2 * stream,
    )
    yield Case(op="residual_gate_norm_scale_shift", what="modulated", run=gated, moved=4 * stream)
    yield Case(
        op="residual_gate_add",
        what="gated",
        run=lambda **how: residual_gate_add(x, y, gate, **how),
        moved=3 * stream,
    )


def _rotations(shape: Shape, random: Callable[..., torch.Tensor], stream: int) -> Iterator[Case]:
    x = random(shape.batch, shape.tokens, shape.heads, shape.head_dim)
    angles = random(shape.tokens, shape.head_dim // 2, kind=torch.float32)
    cos, sin = angles.cos(), angles.sin()
    for mode in ("rotated_interleaved", "rotated_half"):

        def rotate(mode: str = mode, **how: Any) -> Any:
            return rotary_position_embedding(x, cos, sin, mode, **how)

        moved = 2 * stream + 2 * cos.numel() * cos.itemsize
        yield Case(op="rotary_position_embedding", what=mode.removeprefix("rotated_"), run=rotate, moved=moved)


def _attentions(shape: Shape, random: Callable[..., torch.Tensor], stream: int) -> Iterator[Case]:
    q = random(shape.batch, shape.tokens, shape.heads, shape.head_dim)
    for what, keys in (("self", shape.tokens), ("cross", TEXT_TOKENS)):
        k, v = (random(shape.batch, keys, shape.heads, shape.head_dim) for _ in range(2))

        def attend(k: torch.Tensor = k, v: torch.Tensor = v, **how: Any) -> Any:
            return attention_forward(q, k, v, **how)

        products = 4 * shape.batch * shape.heads * shape.tokens * keys * shape.head_dim
        moved = 2 * stream + 2 * k.numel() * k.itemsize
        yield Case(op="attention_forward", what=what, run=attend, moved=moved, computed=products)
