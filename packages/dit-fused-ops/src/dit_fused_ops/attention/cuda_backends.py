"""Attention kernels of CUDA, each of them by name so that they compete; the call is as in `torch_backends`.

Shape suffixes: as in `reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_fused_ops.attention.call import AttentionCall
from dit_fused_ops.attention.masks import given_mask
from dit_fused_ops.attention.reference import UNBOUNDED
from dit_fused_ops.attention.torch_backends import (
    FEW_ENTRIES,
    NOT_EMPTY,
    SAME_BITS,
    SQUARE_CAUSAL,
    flag_or_mask,
    heads_first,
    sdpa_BNSE,
    unit_stride,
)
from dit_fused_ops.dispatch import HALVES, Backend, CompiledPerKind, Rule
from dit_fused_ops.platform import compiler_missing, flash_attn_missing

CUDA = frozenset({"cuda"})
NO_WIDE_GRADIENT = Rule[AttentionCall](
    lambda call: call.head_dim <= 192 or not call.needs_grad, "with a gradient, the head dim must be up to 192"
)


def _one_kernel(kernel: SDPBackend) -> Callable[..., Any]:
    @heads_first
    def run(
        call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, None]:
        flag, whole = flag_or_mask(call, q, mask, lengths)
        q, k, v = (unit_stride(each) for each in (q, k, v))
        with sdpa_kernel(kernel):
            return sdpa_BNSE(call, q, k, v, whole, flag), None

    return run


@heads_first
def _flash_attn(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: None, lengths: None
) -> tuple[Tensor, Tensor | None]:
    from flash_attn import flash_attn_func

    returned = flash_attn_func(
        *(each.transpose(1, 2) for each in (q, k, v)),
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=UNBOUNDED if call.causal else call.window,
        deterministic=call.deterministic,
        return_attn_probs=call.lse,
    )
    out, lse = returned[:2] if call.lse else (returned, None)
    return out.transpose(1, 2), None if lse is None else negative_infinities(lse)


def negative_infinities(lse: Tensor) -> Tensor:
    """flash-attn says +inf of a query without keys; the logarithm of 0 is -inf."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)


@heads_first
def _flex(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    returned = _FLEX_KINDS.of(call)(q, k, v, **flex_arguments(call, q, mask, lengths))
    return returned if call.lse else (returned, None)


def flex_arguments(call: AttentionCall, q: Tensor, mask: Tensor | None, lengths: Tensor | None) -> dict[str, Any]:
    """The keywords of `flex_attention` for a call: a window skips blocks, masks and lengths change scores."""
    whole = given_mask(call, mask)

    def modified(score: Tensor, b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
        if whole is not None:
            index = (axis if size != 1 else 0 for axis, size in zip((b, h, s, t), whole.shape, strict=True))
            entry = whole[tuple(index)]
            score = score + entry if call.mask_kind == "bias" else torch.where(entry, score, -torch.inf)
        return score if lengths is None else torch.where(t < lengths[b], score, -torch.inf)

    windowed = call.window != UNBOUNDED
    blocks = _window_blocks(call.window, call.queries, call.keys, str(q.device)) if windowed else None
    return {
        "score_mod": None if whole is None and lengths is None else modified,
        "block_mask": blocks,
        "scale": call.scale,
        "enable_gqa": call.groups > 1,
        **({"return_lse": True} if call.lse else {}),  # deprecated in newer torch, and nothing else is in older
    }


@functools.lru_cache(maxsize=64)
def _window_blocks(window: tuple[int, int], queries: int, keys: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    before, after = (queries + keys if bound < 0 else bound for bound in window)

    def visible(b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
        ahead = t - s - (keys - queries)
        return (ahead <= after) & (ahead >= -before)

    # Compiled, it never holds the queries × keys truth values.
    build = create_block_mask if device == "cpu" else torch.compile(create_block_mask)
    with torch.inference_mode(False), torch.no_grad():  # it is kept, also for calls that need a gradient
        return build(visible, None, None, queries, keys, device=device)


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


_FLEX_KINDS = CompiledPerKind(_flex_attention)


FLASH_ATTN = Backend[AttentionCall](
    name="flash_attn",
    run=_flash_attn,
    devices=CUDA,
    dtypes=HALVES,
    honours=frozenset({"causal", "window", "lse", "gqa"}),
    rules=(
        NOT_EMPTY,
        FEW_ENTRIES,
        Rule(lambda call: call.head_dim <= 256, "the head dim must be up to 256"),
    ),
    missing=flash_attn_missing,
    traceable=False,
)
SDPA_FLASH = Backend[AttentionCall](
    name="sdpa_flash",
    run=_one_kernel(SDPBackend.FLASH_ATTENTION),
    devices=CUDA,
    dtypes=HALVES,
    honours=frozenset({"causal", "gqa"}),
    rules=(
        SAME_BITS,
        NOT_EMPTY,
        SQUARE_CAUSAL,
        FEW_ENTRIES,
        NO_WIDE_GRADIENT,
        Rule(lambda call: call.head_dim <= 256, "the head dim must be up to 256"),
    ),
)
SDPA_CUDNN = Backend[AttentionCall](
    name="sdpa_cudnn",
    run=_one_kernel(SDPBackend.CUDNN_ATTENTION),
    devices=CUDA,
    dtypes=HALVES,
    honours=frozenset({"causal"}),
    rules=(
        SAME_BITS,
        NOT_EMPTY,
        SQUARE_CAUSAL,
        Rule(lambda call: call.head_dim % 8 == 0, "the head dim must be a multiple of 8"),
    ),
)
SDPA_EFFICIENT = Backend[AttentionCall](
    name="sdpa_efficient",
    run=_one_kernel(SDPBackend.EFFICIENT_ATTENTION),
    devices=CUDA,
    dtypes=HALVES | {torch.float32},
    honours=frozenset({"mask", "bias", "gradient of the bias", "causal", "window", "key lengths", "value dim"}),
    rules=(SAME_BITS, NOT_EMPTY, FEW_ENTRIES),
)
FLEX = Backend[AttentionCall](
    name="flex",
    run=_flex,
    devices=CUDA,
    dtypes=HALVES | {torch.float32},
    honours=frozenset(
        {"mask", "bias", "causal", "window", "key lengths", "lse", "gradient of the lse", "gqa", "value dim"}
    ),
    rules=(SAME_BITS, NOT_EMPTY),
    missing=compiler_missing,
    costly=True,
)
