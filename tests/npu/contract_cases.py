"""The calls with which the NPU backends of dit-fused-ops are proved: layouts, dtypes, odd sizes, every argument used.

Shape suffixes: B batch, S tokens, N heads, D channels of a head, H all channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_fused_ops import (
    GELU,
    attention_forward,
    attention_forward_varlen,
    fast_layernorm,
    layernorm_scale_shift,
    residual_gate_add,
    residual_gate_norm_scale_shift,
    rms_norm,
    rmsnorm_scale_shift,
    rotary_position_embedding,
    sparse_attention,
    swiglu,
)
from npu.contract import Case, case

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = FLOATS[1:]
TRAINING = ((torch.float32, True), (torch.float32, False), (torch.float16, False), (torch.bfloat16, True))
EPS = 1e-5


class Numbers:
    """Makes the same tensors each time; `grad` asks for their gradients."""

    def __init__(self, dtype: torch.dtype, *, grad: bool = False) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._dtype, self._grad = dtype, grad

    def __call__(self, *shape: int, size: float = 1.0) -> Tensor:
        """Normally distributed, of that size."""
        made = size * torch.randn(shape, generator=self._generator)
        return made.to(self._dtype).requires_grad_(self._grad)

    def mask(self, *shape: int) -> Tensor:
        """Half of it True; the fourth row sees nothing."""
        seen = torch.rand(shape, generator=self._generator) < 0.5
        seen[..., 3, :] = False
        return seen


def name_of(dtype: torch.dtype) -> str:
    """As users write it."""
    return str(dtype).removeprefix("torch.")


def all_cases() -> list[Case]:
    """Of all ops."""
    families = (rope, activations, gates, norms, modulated_norms, attention, laser, sequences, block_sparse)
    return [each for family in families for each in family()]


def rope() -> Iterator[Case]:
    b, s, n, d = 2, 7, 3, 16
    sizes = {"BSND": (b, s, n, d), "BNSD": (b, n, s, d), "SBND": (s, b, n, d)}
    angle = Numbers(torch.float32)(s, d // 2)
    wide = {"rotated_half": torch.cat((angle, angle), -1), "rotated_interleaved": angle.repeat_interleave(2, -1)}
    for mode, table in wide.items():
        for layout, shape in sizes.items():
            for dtype in FLOATS:
                x, cos, sin = Numbers(dtype, grad=True)(*shape), table.cos().to(dtype), table.sin().to(dtype)
                name = f"{mode}-{layout}-{name_of(dtype)}"
                yield case(name, lambda: rotary_position_embedding(x, cos, sin, mode, layout=layout))  # noqa: B023
        x = Numbers(torch.bfloat16, grad=True)(b, s, n, d)
        yield case(f"{mode}-half-width", lambda: rotary_position_embedding(x, angle.cos(), angle.sin(), mode))  # noqa: B023


def activations() -> Iterator[Case]:
    for dtype in FLOATS:
        x = Numbers(dtype, grad=True)(2, 5, 24)
        yield case(f"swiglu-{name_of(dtype)}", lambda: swiglu(x))  # noqa: B023
        for kind in ("none", "tanh", "fast"):
            yield case(f"gelu-{kind}-{name_of(dtype)}", lambda: GELU(kind)(x))  # noqa: B023


def gates() -> Iterator[Case]:
    for dtype in FLOATS:
        numbers = Numbers(dtype)
        x, y, token, sample = (numbers(2, s, 24) for s in (5, 5, 5, 1))
        for name, gate in (("sample", sample), ("token", token)):
            yield case(f"gate-of-{name}-{name_of(dtype)}", lambda: residual_gate_add(x, y, gate))  # noqa: B023


def norms() -> Iterator[Case]:
    for dtype, grad in TRAINING:
        x = Numbers(dtype, grad=grad)(2, 5, 48)
        weight, bias = Numbers(dtype, grad=grad)(2, 48)
        name = f"{name_of(dtype)}{'-grad' if grad else ''}"
        yield case(f"rms-{name}", lambda: rms_norm(x, None, EPS))  # noqa: B023
        yield case(f"rms-weight-{name}", lambda: rms_norm(x, weight, EPS))  # noqa: B023
        yield case(f"layer-{name}", lambda: fast_layernorm(_layer_norm(), x))  # noqa: B023
        yield case(f"layer-affine-{name}", lambda: fast_layernorm(_layer_norm(weight, bias), x))  # noqa: B023
    small = Numbers(torch.float32)(2, 5, 48, size=EPS**0.5)
    yield case("rms-as-small-as-eps", lambda: rms_norm(small, None, EPS))
    yield case("layer-as-small-as-eps", lambda: fast_layernorm(_layer_norm(), small))
    yield case("rms-weight-in-float32", lambda: rms_norm(small.half(), torch.linspace(1, 2, 48), EPS))
    for impl_mode in (1, 2):
        yield case(f"layer-mode-{impl_mode}", lambda: fast_layernorm(_layer_norm(), small.half(), impl_mode))  # noqa: B023


def _layer_norm(weight: Tensor | None = None, bias: Tensor | None = None) -> nn.LayerNorm:
    norm = nn.LayerNorm(48, eps=EPS, elementwise_affine=False)
    if weight is not None and bias is not None:
        norm.weight, norm.bias = (nn.Parameter(each.detach(), each.requires_grad) for each in (weight, bias))
    return norm


def modulated_norms() -> Iterator[Case]:
    for dtype, grad in TRAINING:
        for along in ((2, 48), (2, 5, 48)):
            numbers = Numbers(dtype, grad=grad)
            x, y = numbers(2, 5, 48), numbers(2, 5, 48)
            gate, scale, shift = (numbers(*along) for _ in range(3))
            affine, plain = _layer_norm(*numbers(2, 48)), _layer_norm()
            rms = nn.RMSNorm(48, eps=EPS, dtype=dtype).requires_grad_(grad)
            calls = {
                "layer": lambda: layernorm_scale_shift(plain, x, scale, shift),  # noqa: B023
                "layer-affine": lambda: layernorm_scale_shift(affine, x, scale, shift),  # noqa: B023
                "rms": lambda: rmsnorm_scale_shift(rms, x, scale, shift),  # noqa: B023
                "layer-all": lambda: residual_gate_norm_scale_shift(plain, x, y, gate, scale, shift),  # noqa: B023
                "rms-all": lambda: residual_gate_norm_scale_shift(rms, x, y, gate, scale, shift),  # noqa: B023
            }
            for what, call in calls.items():
                name = f"{what}-{'token' if len(along) == 3 else 'sample'}-{name_of(dtype)}"
                yield case(f"{name}{'-grad' if grad else ''}", call)
    small = Numbers(torch.float32)(2, 5, 48, size=EPS**0.5)
    yield case("layer-modulated-as-small-as-eps", lambda: layernorm_scale_shift(_layer_norm(), small, small, small))
    vector = Numbers(torch.float32)(2, 48)
    yield case("layer-sample-as-small-as-eps", lambda: layernorm_scale_shift(_layer_norm(), small, vector, vector))


B, N, KEY_HEADS, Q_LEN, K_LEN, D = 2, 4, 2, 37, 53, 16


def attention() -> Iterator[Case]:
    mask = Numbers(torch.float32).mask(B, N, Q_LEN, K_LEN)
    hidden: dict[str, dict[str, Any]] = {
        "mask": {"attn_mask": mask[0, 0]},
        "mask-of-each-batch": {"attn_mask": mask[:, :1]},
        "mask-of-each-head": {"attn_mask": mask},
        "lengths": {"key_lengths": [K_LEN, 20]},
        "causal": {"is_causal": True},
        "causal-and-mask": {"is_causal": True, "attn_mask": mask[0, 0]},
        "causal-with-more-queries": {"is_causal": True, "tokens": (K_LEN, Q_LEN)},
        "window": {"window": (9, 5)},
        "window-before": {"window": (9, -1)},
        "as-many-key-heads": {"is_causal": True, "heads": (N, N)},
        "one-query": {"tokens": (1, K_LEN), "attn_mask": mask[:, :1, :1]},
        "one-query-in-a-window": {"tokens": (1, K_LEN), "window": (9, 5)},
    }
    for what, asked in hidden.items():
        yield _attention(f"{what}-grad", torch.float32, grad=True, **asked)
        yield _attention(f"{what}-lse", torch.bfloat16, return_lse=True, **asked)
        yield _attention(what, torch.float16, **asked)
    for dtype in FLOATS:
        for first in (False, True):
            for layout in ("BNSD", "BSND", "BSH"):
                yield _attention(f"{'BNSD' if first else 'BSND'}-as-{layout}", dtype, head_first=first, layout=layout)


def _attention(
    name: str,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (N, KEY_HEADS),
    tokens: tuple[int, int] = (Q_LEN, K_LEN),
    channels: int = D,
    head_first: bool = True,
    grad: bool = False,
    handed_to: str = "",
    **asked: Any,
) -> Case:
    numbers = Numbers(dtype, grad=grad)
    shapes = ((B, n, s, channels) if head_first else (B, s, n, channels) for n, s in zip(heads, tokens, strict=True))
    (q, k), v = (numbers(*shape) for shape in shapes), None
    v = numbers(*k.shape)
    return case(
        f"{name}-{name_of(dtype)}",
        lambda: attention_forward(q, k, v, scale=0.3, head_first=head_first, **asked),
        handed_to,
    )


def laser() -> Iterator[Case]:
    """Its tiles have 256 tokens and 128 channels; the few keys of the first case make each one count."""
    for dtype in HALVES:
        for tokens in (5, 256):
            yield _attention(
                f"laser-{tokens}",
                dtype,
                heads=(2, 2),
                tokens=(tokens, tokens),
                channels=64,
                handed_to="ascend_laser_attention",
            )
    yield _attention("laser-long", torch.float16, heads=(1, 1), tokens=(2048, 2048), channels=64)


def sequences() -> Iterator[Case]:
    for dtype, grad in TRAINING:
        for causal in (False, True):
            numbers = Numbers(dtype, grad=grad)
            q, k, v = numbers(30, N, D), numbers(50, KEY_HEADS, D), numbers(50, KEY_HEADS, D)
            name = f"{name_of(dtype)}{'-causal' if causal else ''}{'-grad' if grad else ''}"
            bounds: tuple[Sequence[int], Sequence[int]] = ([0, 12, 12, 30], [0, 15, 15, 50])
            yield case(name, lambda: attention_forward_varlen(q, k, v, *bounds, None, None, 0.0, 0.3, causal))  # noqa: B023


def block_sparse() -> Iterator[Case]:
    """Frames of 10 x 9 tokens, so that tiles and blocks are cut short, and a text of 30."""
    tokens = 30 + 5 * 10 * 9
    for dtype in HALVES:
        for batch, heads, channels in ((1, 2, 64), (2, 2, 128)):
            numbers = Numbers(dtype, grad=channels == 128)
            q, k, v = (numbers(batch, heads, tokens, channels) for _ in range(3))
            for sparse_type in ("rf_v2", "rf_v3"):
                yield case(
                    f"{sparse_type}-{name_of(dtype)}-b{batch}-d{channels}",
                    lambda: sparse_attention(
                        q,  # noqa: B023
                        k,  # noqa: B023
                        v,  # noqa: B023
                        scale=0.3,
                        sparse_type=sparse_type,  # noqa: B023
                        txt_len=30,
                        latent_shape_q=(5, 10, 9),
                        latent_shape_k=(5, 10, 9),
                        sparsity=0.7,
                        backend="naive",  # named, lest so short a sequence be attended to densely
                    ),
                )
