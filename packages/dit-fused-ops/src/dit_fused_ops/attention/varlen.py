"""Attention of sequences of any length that stand one after the other.

Shape suffixes: T tokens of all sequences, B sequences of one length, S query tokens, N query heads, K key heads,
D channels of a head, E channels of a value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.attention.varlen_backends import VARLEN_BACKENDS, probe_varlen
from dit_fused_ops.attention.varlen_call import VarlenCall, describe_varlen
from dit_fused_ops.dispatch import Op, dispatcher
from dit_fused_ops.errors import ParametersInvalid

ATTENTION_VARLEN: Op[VarlenCall] = Op(
    name="attention_forward_varlen",
    describe=describe_varlen,
    backends=VARLEN_BACKENDS,
    probe=probe_varlen,
    autocast_tensors=3,
)

Bounds = Tensor | Sequence[int]


def attention_forward_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Bounds,
    cu_seqlens_k: Bounds,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    block_table: Tensor | None = None,
    *,
    strict: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Return ``softmax(scale · q kᵀ) v`` of each sequence and head, the sequences one after the other.

    The signature is that of flash_attn_varlen_func. With `strict`, the arguments that MindIE SD does not carry out are
    refused as it refuses them; ``strict=False`` carries them out, but for `alibi_slopes` and `block_table`. A query
    that sees no key gets 0; a sequence may be empty.

    CUDA kernels take the lengths from the device, all others from the host. Lengths in a tensor on an accelerator are
    therefore read at each call, which waits for the device, but for the backend "flash_attn" with both `max_seqlen`;
    a list, or a tensor on the CPU, waits for nothing. Under torch.compile and torch.export give lists.

    Args:
        q: [T, N, D], the queries of all sequences.
        k: [T', K, D], their keys; N / K neighbouring query heads share one of the heads.
        v: [T', K, E], their values.
        cu_seqlens_q: where sequences begin and end: 0, the end of the first, ..., T. A list or a tensor of int32 or
            int64.
        cu_seqlens_k: the same of the keys, 0 to T'.
        max_seqlen_q: tokens of the longest sequence, a hint (strict=False).
        max_seqlen_k: the same of the keys.
        dropout_p: must be 0.
        softmax_scale: of the scores; ``D ** -0.5`` without it.
        causal: a query sees no key after its position; the last query of a sequence stands at its last key.
        window_size: (before, after): a query sees so many keys before and after its position, -1 is no bound
            (strict=False).
        softcap: c > 0 turns each scaled score s into ``c · tanh(s / c)`` (strict=False).
        alibi_slopes: refused.
        deterministic: nothing is measured, and no kernel is taken whose gradient differs from run to run
            (strict=False).
        return_attn_probs: also return the logarithm of the softmax's denominator (strict=False).
        block_table: refused.
        strict: whether to refuse what MindIE SD refuses.
        backend: the backend that must do it, of `capabilities()`.

    Returns:
        [T, N, E] in the dtype of `q`; with `return_attn_probs` (that, the logarithm [N, T] in float32, None).

    Raises:
        ParametersInvalid: a type, rank, size or dtype does not fit, the lengths are no lengths, or an argument is
            refused.
        BackendRefused: `backend` cannot carry out this call.
    """
    beyond = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "return_attn_probs": return_attn_probs,
        "block_table": block_table,
    }
    _check_accepted(beyond, dropout_p, strict)
    (q_tensor, q_bounds), (k_tensor, k_bounds) = (
        _host_where_possible(bounds, name, q)
        for bounds, name in ((cu_seqlens_q, "cu_seqlens_q"), (cu_seqlens_k, "cu_seqlens_k"))
    )
    tensors = (q, k, v, q_tensor, k_tensor)
    options = (
        q_bounds,
        k_bounds,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        tuple(window_size) if isinstance(window_size, list) else window_size,
        0.0 if softcap is None else softcap,
        False if deterministic is None else deterministic,
        False if return_attn_probs is None else return_attn_probs,
        backend is not None,
    )
    mode = "static" if deterministic else None
    returned = dispatcher(ATTENTION_VARLEN, tensors, options, mode=mode, named=backend)
    return (*returned, None) if return_attn_probs else returned


def _check_accepted(beyond: dict[str, Any], dropout_p: float, strict: bool) -> None:
    given = {name: value for name, value in beyond.items() if value is not None}
    if not strict:
        given = {name: value for name, value in given.items() if name in ("alibi_slopes", "block_table")}
    if given:
        words = ", ".join(f"{name}={_brief(value)}" for name, value in given.items())
        remedy = (
            "leave them out, or say strict=False for those of flash_attn"
            if strict
            else "give a bias to attention_forward instead of slopes, and contiguous keys instead of a table"
        )
        raise ParametersInvalid(f"Unsupported parameters in varlen attention: {words}; {remedy}")
    if dropout_p != 0:
        raise ParametersInvalid(f"dropout_p should be set to 0.0 during evaluation, but got {dropout_p}")


def _brief(value: Any) -> str:
    return f"a Tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _host_where_possible(bounds: Any, name: str, q: Tensor) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """The bounds as (tensor, None) on CUDA, and as (None, whole numbers) everywhere else."""
    if isinstance(bounds, (list, tuple)):
        if any(isinstance(bound, bool) or not isinstance(bound, int) for bound in bounds):
            raise ParametersInvalid(f"{name} must hold whole numbers, given {bounds!r}")
        return None, tuple(bounds)
    if not isinstance(bounds, Tensor) or bounds.dtype not in (torch.int32, torch.int64) or bounds.dim() != 1:
        given = f"{bounds.dtype} {list(bounds.shape)}" if isinstance(bounds, Tensor) else type(bounds).__name__
        raise ParametersInvalid(f"{name} must be a list or a 1-D Tensor of int32 or int64, given {given}")
    if torch.compiler.is_compiling():
        raise ParametersInvalid(f"{name} is a Tensor; under torch.compile and torch.export give a list")
    if bounds.device.type == "cuda":
        return bounds, None
    return None, tuple(bounds.tolist())
