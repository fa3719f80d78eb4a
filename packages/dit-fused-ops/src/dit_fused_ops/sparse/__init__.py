"""Sparse attention over video: one public function, its selection of blocks, its reference, its backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.attention import attention_forward
from dit_fused_ops.dispatch import Op, Probe, dispatcher
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.sparse.backends import BACKENDS
from dit_fused_ops.sparse.call import SparseCall, describe
from dit_fused_ops.sparse.reference import block_sparse_attention_naive
from dit_fused_ops.sparse.request import (
    RainFusion,
    rain_fusion,
    refuse_what_is_missing,
    require_qkv,
    require_sparse_type,
)
from dit_fused_ops.sparse.selection import density, select_blocks
from dit_fused_ops.sparse.tiles import token_order

__all__ = ["sparse_attention", "block_sparse_attention_naive", "BLOCK_SPARSE", "DENSE_FROM"]

DENSE_FROM = 0.6
"""The kept share of blocks from which dense attention is computed instead: it is as fast there, and more exact.

Measured on two cores of a CPU with AVX-512 and 12,000 to 31,000 tokens: backend "gather" is as fast as dense attention
at 0.55 to 0.6 in float32 and at 0.7 in bfloat16.
"""

_PROBED_BLOCKS = 3  # blocks of queries compared with the reference before a backend may win


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    head_num: int = 1,
    input_layout: str = "BNSD",
    inner_precise: int = 0,
    sparse_type: str | None = None,
    txt_len: int = 0,
    block_size: int = 128,
    latent_shape_q: Sequence[int] | None = None,
    latent_shape_k: Sequence[int] | None = None,
    video_spans: Any = None,
    keep_sink: bool = True,
    keep_recent: bool = True,
    cdf_threshold: float = 1.0,
    sparsity: float = 0.0,
    precision: str = "bf16",
    *,
    return_density: bool = False,
    backend: str | None = None,
    legacy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention in which each block of queries sees the key blocks that matter most to it.

    With `sparse_type` "rf_v2" or "rf_v3" (RainFusion 2 of MindIE SD, which differ only in the vendor's kernels) the
    sequence is [text | video]. The video is put in the order of 8 · 8 tiles and the text behind it; each block of
    `block_size` tokens is represented by its mean; of K key blocks a block of queries keeps the
    ``max(1, ceil(K · (1 - sparsity)))`` that score highest, besides those of the first frame and of the text, which
    everything sees and which see everything. What is kept is computed exactly::

        softmax(scale · q kᵀ over the kept keys) v

    Where at least `DENSE_FROM` of all pairs of blocks would be kept, whatever the numbers, dense attention is computed
    instead; not when `backend` or `legacy` is given. On CUDA FlexAttention does it, whose first call is compiled.

    Args:
        q: queries, [B, N, S, D] or [B, S, N, D] as `input_layout` says.
        k: keys; their heads divide those of the queries, their length may differ.
        v: values, of the shape of the keys.
        attn_mask: of `attention_forward`; only without a sparse type.
        scale: of the scores; D ** -0.5 without it.
        is_causal: of `attention_forward`; only without a sparse type.
        head_num: the heads of the queries, which their shape says as well.
        input_layout: "BNSD" or "BSND", of the result as well.
        inner_precise: 0, or 1 for the faster and less precise softmax of the NPU's kernels in float16.
        sparse_type: None for dense attention, which needs nothing of what follows; "rf_v2" or "rf_v3".
        txt_len: tokens of text, before the video in q, k and v.
        block_size: tokens of a block, a multiple of 128.
        latent_shape_q: frames, height and width of the queries' video, in tokens.
        latent_shape_k: the same of the keys.
        video_spans: not implemented.
        keep_sink: of "ada_bsa", which is not implemented.
        keep_recent: the same.
        cdf_threshold: the same.
        sparsity: the share of key blocks to leave out, 0 to 1.
        precision: "bf16": nothing is quantised.
        return_density: whether to return the share of pairs of tokens that took part, too.
        backend: the backend that must do it, of `capabilities()`.
        legacy: select as MindIE SD does: the first batch entry's selection holds for all, text in the block where the
            video ends is not protected, and a rounded product may keep one block more.

    Returns:
        The attention, of the shape, layout and dtype of `q`; with `return_density` a pair of it and a float32 tensor []
        on its device, 1 where it is dense. Gradients do not flow through the selection.

    Raises:
        ParametersInvalid: an argument is wrong, is missing, or cannot be honoured with this sparse type.
        BackendRefused: `backend` cannot carry out this call.
    """
    require_qkv(q, k, v, input_layout, head_num)
    if inner_precise not in (0, 1):
        raise ParametersInvalid(f"inner_precise is {inner_precise!r}, legal are 0 and 1")
    if sparse_type is None:
        output = _dense(q, k, v, input_layout, attn_mask=attn_mask, scale=scale, is_causal=is_causal, op_type=backend)
        return (output, torch.ones((), dtype=torch.float32, device=q.device)) if return_density else output
    require_sparse_type(sparse_type, keep_sink, keep_recent, cdf_threshold)
    refuse_what_is_missing(attn_mask, is_causal, video_spans, precision)
    tokens = input_layout.index("S")
    request = rain_fusion(
        q_tokens=q.shape[tokens],
        k_tokens=k.shape[tokens],
        head_dim=q.shape[3],
        scale=scale,
        txt_len=txt_len,
        block_size=block_size,
        latent_shape_q=latent_shape_q,
        latent_shape_k=latent_shape_k,
        sparsity=sparsity,
        legacy=legacy,
    )
    if request.least_density >= DENSE_FROM and backend is None and not legacy:
        output = _dense(q, k, v, input_layout, scale=request.scale)
        return (output, torch.ones((), dtype=torch.float32, device=q.device)) if return_density else output
    if input_layout == "BSND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output, kept = _sparse(request, q, k, v, inner_precise, backend)
    output = output if input_layout == "BNSD" else output.transpose(1, 2).contiguous()
    return (output, density(kept, request.q_blocks, request.k_blocks)) if return_density else output


def _sparse(
    request: RainFusion, q: Tensor, k: Tensor, v: Tensor, inner_precise: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Order the tokens [B, N, S, D], select the blocks, attend, order the result back; also return the selection."""
    q_order = token_order(request.latent_q, request.txt_len, q.device)
    k_order = token_order(request.latent_k, request.txt_len, q.device)
    q, k, v = (x.index_select(2, order) for x, order in ((q, q_order), (k, k_order), (v, k_order)))
    mask = select_blocks(
        q, k, request.q_blocks, request.k_blocks, scale=request.scale, kept=request.kept, legacy=request.legacy
    )
    options = (request.scale, request.q_blocks.size, inner_precise, round(request.least_density, 1))
    output: Tensor = dispatcher(BLOCK_SPARSE, (q, k, v, mask), options, named=backend)
    return output.index_select(2, q_order.argsort()), mask


def _dense(q: Tensor, k: Tensor, v: Tensor, layout: str, **more: Any) -> Tensor:
    output = attention_forward(q, k, v, head_first=layout == "BNSD", **more)
    assert isinstance(output, Tensor), "without return_lse it is one tensor"
    return output


def _probe(call: SparseCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Probe:
    """Compare some blocks of queries, the first and the last among them."""
    count, size = call.block_counts[0], call.block_size
    blocks = sorted({round(part * (count - 1) / (_PROBED_BLOCKS - 1)) for part in range(_PROBED_BLOCKS)})

    def select(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, block * size : (block + 1) * size] for block in blocks], dim=2)

    wanted = block_sparse_attention_naive(select(q), k, v, mask[:, :, blocks], scale=call.scale, block_size=size)
    return Probe(select=select, wanted=wanted)


BLOCK_SPARSE: Op[SparseCall] = Op(
    name="block_sparse_attention", describe=describe, backends=BACKENDS, probe=_probe, autocast_tensors=3
)
