"""Attention: two public functions, their reference, their backends.

`attention_forward` is for batches of equal length, `attention_forward_varlen` for sequences of any length one after
the other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from dit_fused_ops.attention.call import AttentionCall, describe, lengths_tensor
from dit_fused_ops.attention.cuda_backends import FLASH_ATTN, FLEX, SDPA_CUDNN, SDPA_EFFICIENT, SDPA_FLASH
from dit_fused_ops.attention.npu_backends import LASER_SHORTEST, NPU_BACKENDS
from dit_fused_ops.attention.probe import probe_attention
from dit_fused_ops.attention.reference import Window, attention_naive
from dit_fused_ops.attention.torch_backends import EAGER, NAIVE, SDPA, SDPA_LSE
from dit_fused_ops.attention.varlen import ATTENTION_VARLEN, attention_forward_varlen
from dit_fused_ops.dispatch import Op, dispatcher
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.platform import A5, soc_version

__all__ = [
    "attention_forward",
    "attention_forward_varlen",
    "attention_naive",
    "ATTENTION",
    "ATTENTION_VARLEN",
]

MODES = ("runtime", "static", "manual")
TYPE_VARIABLE = "MINDIE_SD_FA_TYPE"
DEFAULT_TYPE, LASER = "fused_attn_score", "ascend_laser_attention"
NOT_ON_A5 = (LASER, "prompt_flash_attn")

ATTENTION: Op[AttentionCall] = Op(
    name="attention_forward",
    describe=describe,
    backends=(
        *NPU_BACKENDS,
        SDPA,
        FLASH_ATTN,
        SDPA_FLASH,
        SDPA_CUDNN,
        SDPA_EFFICIENT,
        SDPA_LSE,
        FLEX,
        EAGER,
        NAIVE,
    ),
    probe=probe_attention,
    autocast_tensors=3,
)


@overload
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    scale: float | None = ...,
    fused: bool = ...,
    head_first: bool = ...,
    *,
    opt_mode: str = ...,
    op_type: str | None = ...,
    layout: str | None = ...,
    is_causal: bool = ...,
    window: Window | None = ...,
    key_lengths: Tensor | Sequence[int] | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    legacy: bool = ...,
) -> Tensor: ...
@overload
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    scale: float | None = ...,
    fused: bool = ...,
    head_first: bool = ...,
    *,
    opt_mode: str = ...,
    op_type: str | None = ...,
    layout: str | None = ...,
    is_causal: bool = ...,
    window: Window | None = ...,
    key_lengths: Tensor | Sequence[int] | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    legacy: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    fused: bool = True,
    head_first: bool = False,
    *,
    opt_mode: str = "runtime",
    op_type: str | None = None,
    layout: str | None = None,
    is_causal: bool = False,
    window: Window | None = None,
    key_lengths: Tensor | Sequence[int] | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    legacy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``softmax(scale · q kᵀ + bias) v`` of each head (arXiv 1706.03762), in the layout of `query`.

    The softmax is float32 or wider. A query that sees no key gets 0, forward and in every gradient.

    Args:
        query: [B, S, N, D], or [B, N, S, D] with `head_first`.
        key: [B, T, K, D] or [B, K, T, D]; N / K neighbouring query heads share one of its heads.
        value: [B, T, K, E] or [B, K, T, E].
        attn_mask: [S, T], [B, S, T] or [B, N, S, T], where 1 may stand for every size but T. Truth values and whole
            numbers keep the keys where they are not 0; floating numbers are added to the scores, on an accelerator
            rounded to the dtype of `query` first.
        scale: of the scores; ``D ** -0.5`` without it.
        fused: False computes the reference.
        head_first: whether heads stand before tokens, in all three tensors and in the result.
        opt_mode: "runtime" takes the dispatcher's setting, which is to measure what can do the call at the first call
            of a kind and to remember the fastest; "static" measures nothing; "manual" takes `op_type`, or what the
            environment variable MINDIE_SD_FA_TYPE names instead. Without either that is "fused_attn_score" on an NPU,
            elsewhere the static choice.
        op_type: the backend that must do it, of `capabilities()`; "manual" is then understood. Two are replaced as
            MindIE SD replaces them: laser attention of less than 2048 tokens, and on the A5 laser and prompt flash
            attention, by "fused_attn_score".
        layout: "BNSD", "BSND" or "BSH": in which an NPU kernel is called. The result is the same.
        is_causal: a query sees no key after its position. The last query stands at the last key.
        window: (before, after): a query sees so many keys before and after its position; -1 is no bound.
        key_lengths: [B] whole numbers: of each batch entry the first so many keys are seen. A list is checked,
            and copied to the device; a tensor is not read, and no length under 0 or over T changes anything more.
        return_lse: also return the logarithm of the softmax's denominator, [B, N, S] float32; -inf of a query that
            sees no key.
        deterministic: nothing is measured, and no kernel is taken whose gradient differs from run to run.
        legacy: floating masks keep where they are not 0, as in MindIE SD.

    Returns:
        [B, S, N, E] or [B, N, S, E] in the dtype of `query`, with `return_lse` the pair of it and the logarithm.

    Raises:
        ParametersInvalid: a type, rank, size or dtype does not fit, or there is no such mode or type.
        BackendRefused: `op_type` cannot carry out this call; the message says why and what can.
    """
    mode, named = _choice(opt_mode, op_type, query, key, head_first)
    named = named if fused else "naive"
    if legacy and isinstance(attn_mask, Tensor):
        attn_mask = attn_mask.bool()
    lengths = lengths_tensor(key_lengths, query, key, head_first)
    bounds = tuple(window) if isinstance(window, list) else window
    tensors = (query, key, value, attn_mask, lengths)
    options = (scale, fused, head_first, layout, is_causal, bounds, return_lse, deterministic, named is not None)
    if deterministic:
        mode = "static"
    returned: Tensor | tuple[Tensor, Tensor] = dispatcher(ATTENTION, tensors, options, mode=mode, named=named)
    return returned


def _choice(
    opt_mode: str, op_type: str | None, query: Tensor, key: Tensor, head_first: bool
) -> tuple[str | None, str | None]:
    """The mode of the dispatcher, and the backend that must do it."""
    if opt_mode not in MODES:
        raise ParametersInvalid(f"The input 'opt_mode':{opt_mode} is invalid, legal are {', '.join(MODES)}")
    if opt_mode != "manual" and op_type is None:
        return (None if opt_mode == "runtime" else opt_mode), None
    named = os.environ.get(TYPE_VARIABLE) or op_type
    on_npu = isinstance(query, Tensor) and query.device.type == "npu"
    if named is None:
        return "static", DEFAULT_TYPE if on_npu else None
    if ATTENTION.backend(named) is None:
        legal = ", ".join(backend.name for backend in ATTENTION.backends)
        raise ParametersInvalid(f"Unsupported FA type: {named!r}, legal are {legal}")
    if named == LASER and _shorter_than(LASER_SHORTEST, query, key, head_first):
        return "static", DEFAULT_TYPE
    if on_npu and named in NOT_ON_A5 and soc_version() in A5:
        warnings.warn(f"{named} is not made for the A5; {DEFAULT_TYPE} does it", RuntimeWarning, stacklevel=3)
        return "static", DEFAULT_TYPE
    return "static", named


def _shorter_than(tokens: int, query: Tensor, key: Tensor, head_first: bool) -> bool:
    given = [each for each in (query, key) if isinstance(each, Tensor) and each.dim() == 4]
    return any(each.shape[2 if head_first else 1] < tokens for each in given)
