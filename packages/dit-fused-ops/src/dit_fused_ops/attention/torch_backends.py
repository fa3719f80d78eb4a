"""Attention with torch alone. Each `run(call, query, key, value, attn_mask, key_lengths)` returns the output in the
layout of the query, and with `call.lse` the pair of it and [B, N, S].

Shape suffixes: as in `reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fused_ops.attention.call import AttentionCall
from dit_fused_ops.attention.masks import close_rows, given_mask, open_rows, whole_mask
from dit_fused_ops.attention.reference import UNBOUNDED, Window, attention_math, query_positions
from dit_fused_ops.attention.varlen_call import VarlenCall
from dit_fused_ops.dispatch import FLOATS, HALVES, Backend, Rule

# attend(call, q_BNSD, k_BKTD, v_BKTE, attn_mask, key_lengths) -> out_BNSE, lse_BNS or None
Attend = Callable[..., tuple[Tensor, Tensor | None]]

# Matrices of scores that are small enough to be held; 64 MiB in float32.
HELD_SCORES = 1 << 24

IN_SDPA = frozenset({"mask", "bias", "causal", "window", "key lengths", "gqa", "value dim"})
EVERYTHING = IN_SDPA | {"gradient of the bias", "lse", "gradient of the lse"}

# Of attention_forward and attention_forward_varlen alike.
SAME_BITS: Rule[Any] = Rule(
    lambda call: (
        not (call.deterministic and call.needs_grad)
        or call.device.type == "cpu"
        or torch.are_deterministic_algorithms_enabled()
    ),
    "the order of the sums in its gradient changes from run to run, and deterministic=True was asked for; "
    "torch.use_deterministic_algorithms(True) fixes it",
)
# A kernel that is called beside its front door may divide by the number of keys.
NOT_EMPTY = Rule[AttentionCall](lambda call: call.scores > 0, "there is no query or no key")
# CUDA starts one column of blocks an entry, and one a head.
FEW_ENTRIES = Rule[AttentionCall](
    lambda call: call.device.type == "cpu" or max(call.batch, call.heads) <= 65535, "at most 65535 entries and heads"
)
SQUARE_CAUSAL = Rule[AttentionCall](
    lambda call: not call.causal or call.queries == call.keys, "causal needs as many queries as keys"
)


def unit_stride(x: Tensor) -> Tensor:
    """The tensor, whose channels stand one after the other: kernels want that, and the choice did not look."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_first(attend: Attend) -> Callable[..., Any]:
    """Let `attend` see tensors with the heads before the tokens, as views, and give the result the layout back."""

    @functools.wraps(attend)
    def run(
        call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if call.layout == "BSND":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, lse = attend(call, q, k, v, mask, lengths)
        if call.layout == "BSND":
            out = out.transpose(1, 2)
        return (out, lse) if call.lse else out

    return run


def sdpa_BNSE(
    call: AttentionCall | VarlenCall,
    q_BNSD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """`F.scaled_dot_product_attention` whose queries without keys give 0; `is_causal` needs as many queries as keys."""
    share, seeing = False, None
    if call.groups != 1:  # an `if`, as torch.compile may have a symbol for the number
        share = True
    if mask is None and not share:
        return F.scaled_dot_product_attention(q_BNSD, k_BKTD, v_BKTE, is_causal=is_causal, scale=call.scale)
    on_cpu = call.device.type == "cpu"
    if mask is not None and not on_cpu:  # on CPU the kernels give 0 by themselves
        mask, seeing = open_rows(mask)
    if mask is not None and mask.is_floating_point() and not (on_cpu and mask.dtype == torch.float32):
        mask = mask.to(call.dtype)
    if share and not on_cpu and (mask is not None or call.dtype not in HALVES):
        # Only the flash kernel lets query heads share; the others would give way to plain products.
        share = False
        k_BKTD, v_BKTE = (each.repeat_interleave(call.groups, dim=1) for each in (k_BKTD, v_BKTE))
    out = F.scaled_dot_product_attention(
        q_BNSD, k_BKTD, v_BKTE, attn_mask=mask, is_causal=is_causal, scale=call.scale, enable_gqa=share
    )
    return out if seeing is None else close_rows(out, seeing)


def flag_or_mask(
    call: AttentionCall, q: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> tuple[bool, Tensor | None]:
    """What `sdpa_BNSE` is told: is_causal where that alone says it, else all that is hidden in one mask."""
    if mask is None and lengths is None:
        if call.window == UNBOUNDED:
            return False, None
        if call.causal and call.queries == call.keys:
            return True, None
    return False, whole_mask(call, q, mask, lengths)


@heads_first
def _sdpa(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, None]:
    flag, whole = flag_or_mask(call, q, mask, lengths)
    return sdpa_BNSE(call, q, k, v, whole, flag), None


@heads_first
def _sdpa_lse(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: None, lengths: None) -> tuple[Tensor, Tensor]:
    """The kernels beneath `F.scaled_dot_product_attention`, which keep the logarithm for their gradient."""
    aten = torch.ops.aten
    q, k, v = (unit_stride(each) for each in (q, k, v))
    if call.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, call.causal, scale=call.scale)
    elif call.dtype == torch.float32:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, call.causal, scale=call.scale
        )
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, call.causal, False, scale=call.scale)
    return out, lse[..., : call.queries]  # the efficient kernel pads the rows


def math_in_blocks(
    q_BNSD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    window: Window,
    key_lengths: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`attention_math`, in blocks of queries where the scores of all of them would not be small."""
    (batch, heads, queries, _), keys = q_BNSD.shape, k_BKTD.shape[2]
    positions = query_positions(queries, keys, q_BNSD.device)
    rows = queries if batch * heads * queries * keys <= HELD_SCORES else max(1, HELD_SCORES // (batch * heads * keys))
    outs, lses = [], []
    for first in range(0, max(queries, 1), max(rows, 1)):
        block = slice(first, first + rows)
        out, lse = attention_math(
            q_BNSD[:, :, block],
            k_BKTD,
            v_BKTE,
            mask if mask is None or mask.shape[2] == 1 else mask[:, :, block],
            scale=scale,
            window=window,
            key_lengths=key_lengths,
            softcap=softcap,
            positions=positions[block],
        )
        outs.append(out)
        lses.append(lse.float())
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, dim=2), torch.cat(lses, dim=2))


@heads_first
def _eager(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    return math_in_blocks(q, k, v, given_mask(call, mask), scale=call.scale, window=call.window, key_lengths=lengths)


@heads_first
def _naive(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    given = given_mask(call, mask)
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    out, lse = math_in_blocks(
        q.to(wide), k.to(wide), v.to(wide), given, scale=call.scale, window=call.window, key_lengths=lengths
    )
    return out.to(call.dtype), lse


def _fused_kernel_takes(call: AttentionCall) -> bool:
    return SDPA.refuses(call) is None or SDPA_LSE.refuses(call) is None


SDPA = Backend[AttentionCall](
    name="sdpa",
    run=_sdpa,
    honours=IN_SDPA | {"gradient of the bias"},
    rules=(
        SAME_BITS,
        Rule(lambda call: call.device.type == "cpu" or call.scores > 0, "there is no query or no key"),
    ),
    note="F.scaled_dot_product_attention, which picks a kernel itself",
)
SDPA_LSE = Backend[AttentionCall](
    name="sdpa_lse",
    run=_sdpa_lse,
    devices=frozenset({"cpu", "cuda"}),
    dtypes=FLOATS,
    honours=frozenset({"causal", "lse"}),
    rules=(
        SAME_BITS,
        NOT_EMPTY,
        SQUARE_CAUSAL,
        FEW_ENTRIES,
        Rule(lambda call: call.lse, "it is for return_lse=True; sdpa is the same without"),
        Rule(
            lambda call: (
                call.device.type == "cpu" or (call.dtype != torch.float64 and call.head_dim in range(8, 257, 8))
            ),
            "on CUDA the head dim must be a multiple of 8, up to 256, and the dtype not float64",
        ),
    ),
)
NOT_HELD_IN_VAIN = f"it would hold the scores, more than {HELD_SCORES}; it does so only when it is named"
EAGER = Backend[AttentionCall](
    name="eager",
    run=_eager,
    honours=EVERYTHING,
    rules=(
        Rule(lambda call: call.scores <= HELD_SCORES or call.named or not _fused_kernel_takes(call), NOT_HELD_IN_VAIN),
    ),
    note="plain products; for what no kernel does",
)
NAIVE = Backend[AttentionCall](
    name="naive",
    run=_naive,
    honours=EVERYTHING,
    note="the reference, in float32",
)
