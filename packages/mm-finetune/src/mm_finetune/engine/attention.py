"""Attention over rows of sequences, by the best kernel of the device. Nobody else here chooses a kernel.

Sequences stand one behind the other; ``bounds`` are their ends, with a 0 in front. No query sees another
sequence, and no mask of ``tokens x tokens`` is ever made.

Shape suffixes: T tokens of all sequences, N query heads, K key-value heads, D head dimension, B sequences, S tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mm_finetune.errors import ConfigError

HALVES = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where sequences begin and end, on the host and on the device.

    Attributes:
        bounds: ``(0, end of the first sequence, …, tokens)``.
        cu_seqlens: the same as int32 on the device.
    """

    bounds: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def packed(cls, cu_seqlens: Tensor) -> Rows:
        """Of a packed row; waits for the device once."""
        return cls(bounds=tuple(cu_seqlens.tolist()), cu_seqlens=cu_seqlens.int())

    @classmethod
    def equal(cls, count: int, tokens: int, device: torch.device) -> Rows:
        """`count` sequences of `tokens` tokens."""
        cu_seqlens = torch.arange(0, count * tokens + 1, tokens, dtype=torch.int32, device=device)
        return cls(bounds=tuple(range(0, count * tokens + 1, tokens)), cu_seqlens=cu_seqlens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(stop - start for start, stop in pairwise(self.bounds))

    def runs(self) -> list[tuple[int, int]]:
        """Neighbours of equal length together: how long each of them is, and how many they are; no empty ones."""
        lengths = groupby(stop - start for start, stop in pairwise(self.bounds))
        return [(length, sum(1 for _ in run)) for length, run in lengths if length]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a kernel may refuse a call for."""

    dtype: torch.dtype
    heads: int
    key_value_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to compute it.

    Attributes:
        run: ``(q_TND, k_TKD, v_TKD, rows, scale, causal) -> out_TND``.
        refuses: why it can't take a shape, in words for the user; None: it can.
    """

    run: Callable[[Tensor, Tensor, Tensor, Rows, float, bool], Tensor]
    refuses: Callable[[Shape], str | None]


def packed_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, rows: Rows, scale: float | None = None, *, causal: bool = True
) -> Tensor:
    """Attention within each sequence, grouped queries included.

    Args:
        q_TND: queries.
        k_TKD: keys; N is a multiple of K.
        v_TKD: values.
        rows: where the sequences are.
        scale: of the scores; default ``D ** -0.5``.
        causal: a query sees the keys up to its own place; otherwise its whole sequence.

    Raises:
        ConfigError: no kernel of the device takes the shape; says why each of them refused.
    """
    shape = Shape(
        dtype=q_TND.dtype, heads=q_TND.shape[1], key_value_heads=k_TKD.shape[1], head_dim=q_TND.shape[2]
    )  # fmt: skip
    kernel = KERNELS[choose(q_TND.device.type, shape)]
    return kernel.run(q_TND, k_TKD, v_TKD, rows, q_TND.shape[2] ** -0.5 if scale is None else scale, causal)


@lru_cache
def choose(device_type: str, shape: Shape) -> str:
    """The name of the first kernel of the device that takes the shape.

    Raises:
        ConfigError: there is none.
    """
    reasons = []
    for name in DEVICES.get(device_type, ("sdpa",)):
        reason = KERNELS[name].refuses(shape)
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    raise ConfigError(f"no attention kernel on {device_type} takes {shape}: {'; '.join(reasons)}")


def _sdpa(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, rows: Rows, scale: float, causal: bool) -> Tensor:
    runs, outs = rows.runs(), []
    # Split, not sliced: the gradient of a slice is a tensor as large as the whole, mostly zeros, for each of them.
    pieces = (x.split([length * count for length, count in runs]) for x in (q_TND, k_TKD, v_TKD))
    for (_, count), *parts in zip(runs, *pieces, strict=True):
        q_BNSD, k_BKSD, v_BKSD = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in parts)
        out_BNSD = scaled_dot_product_attention(q_BNSD, k_BKSD, v_BKSD, is_causal=causal, scale=scale, enable_gqa=True)
        outs.append(out_BNSD.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _varlen_attn(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, rows: Rows, scale: float, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _varlen_options() else {}
    if not grouped:
        # torch 2.11 wants a key and a value for each query head.
        k_TKD, v_TKD = (x.repeat_interleave(q_TND.shape[1] // x.shape[1], dim=1) for x in (k_TKD, v_TKD))
    out = varlen_attn(
        q_TND, k_TKD, v_TKD, rows.cu_seqlens, rows.cu_seqlens, rows.longest, rows.longest,
        scale=scale, window_size=(-1, 0 if causal else -1), **grouped,
    )  # fmt: skip
    return out  # type: ignore[return-value]  # a pair only where more is asked for


@lru_cache
def _varlen_options() -> frozenset[str]:
    """What torch's function can be told; torch 2.10 has it without scale and window."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_attn_refuses(shape: Shape) -> str | None:
    if find_spec("torch.nn.attention.varlen") is None:
        return "is not in this torch"
    if not {"scale", "window_size"} <= _varlen_options():
        return "of this torch takes no scale"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0"
    return _flash_refuses(shape)


def _flash_attn(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, rows: Rows, scale: float, causal: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, longest = rows.cu_seqlens, rows.longest
    out: Tensor = flash_attn_varlen_func(
        q_TND, k_TKD, v_TKD, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=causal
    )
    return out


def _flash_attn_refuses(shape: Shape) -> str | None:
    return "is not installed" if find_spec("flash_attn") is None else _flash_refuses(shape)


def _flash_refuses(shape: Shape) -> str | None:
    """Conditions of the FlashAttention-2 kernels, from their documentation."""
    if shape.dtype not in HALVES:
        return "takes float16 and bfloat16"
    return None if shape.head_dim <= 256 and shape.head_dim % 8 == 0 else "takes head dimensions of 8, 16, …, 256"


def _npu_fusion_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, rows: Rows, scale: float, causal: bool
) -> Tensor:
    # Bounds without the 0; an empty sequence ends where the one before it does, and is left out.
    ends = list(dict.fromkeys(end for end in rows.bounds if end))
    hidden = {"atten_mask": _compressed_triangle(q_TND.device), "sparse_mode": 3} if causal else {}
    out: Tensor = torch.ops.npu.npu_fusion_attention(
        q_TND, k_TKD, v_TKD, q_TND.shape[1], "TND", scale=scale, actual_seq_qlen=ends, actual_seq_kvlen=ends, **hidden
    )[0]  # fmt: skip
    return out


@lru_cache
def _compressed_triangle(device: torch.device) -> Tensor:
    """The operator's mask for causal attention of any length (sparse mode 3): 2048 x 2048, True is hidden."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


def _npu_refuses(shape: Shape) -> str | None:
    """Conditions of the vendor's op-plugin document of npu_fusion_attention."""
    if shape.dtype not in HALVES | {torch.float32}:
        return "takes float16, bfloat16 and float32"
    if shape.head_dim > 768:
        return "takes head dimensions up to 768"
    if shape.heads > 256:
        return "takes up to 256 heads"
    return None if shape.heads % shape.key_value_heads == 0 else "wants query heads in multiples of key-value heads"


KERNELS: dict[str, Kernel] = {
    "varlen_attn": Kernel(run=_varlen_attn, refuses=_varlen_attn_refuses),
    "flash_attn": Kernel(run=_flash_attn, refuses=_flash_attn_refuses),
    "npu_fusion_attention": Kernel(run=_npu_fusion_attention, refuses=_npu_refuses),
    "sdpa": Kernel(run=_sdpa, refuses=lambda _: None),  # one call for each run of equal lengths
}
# In order of preference; a device that is not named has torch's own.
DEVICES: dict[str, tuple[str, ...]] = {
    "cuda": ("varlen_attn", "flash_attn", "sdpa"),
    "npu": ("npu_fusion_attention",),
}
