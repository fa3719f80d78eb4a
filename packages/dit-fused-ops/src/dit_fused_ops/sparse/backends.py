"""The ways to attend to some blocks. Each `run(call, q, k, v, mask)` returns a tensor of the shape and dtype of q.

The mask is bool [B, N, Q, K], True keeps; in the vendors' ops, too, 1 computes. Shape suffixes: as in `reference`, and
R rows (one block of queries of one head of one batch entry), T tokens of a block of queries, L kept tokens of keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dit_fused_ops.dispatch import FLOATS, HALVES, Backend, CompiledPerKind, Rule
from dit_fused_ops.platform import compiler_missing, op_missing
from dit_fused_ops.sparse.call import SparseCall
from dit_fused_ops.sparse.reference import block_sparse_attention_naive

_PIECES = 4  # torch's attention on cpu cuts a block of queries into this many pieces of work
_MASKED = 2**26  # entries of the mask that is written out at once


def _naive(call: SparseCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    output = block_sparse_attention_naive(q, k, v, mask, scale=call.scale, block_size=call.block_size)
    return output.to(call.dtype)


def kept_lists(mask_BNQK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept key blocks of each block of queries, ascending and padded with -1, and how many they are.

    Returns:
        Two int64 tensors, [B, N, Q, K] and [B, N, Q].
    """
    blocks = mask_BNQK.shape[-1]
    number_K = torch.arange(blocks, device=mask_BNQK.device)
    index_BNQK = torch.where(mask_BNQK, number_K, blocks).sort(dim=-1).values
    return torch.where(index_BNQK == blocks, -1, index_BNQK), mask_BNQK.sum(-1)


def _gather(call: SparseCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Copy the kept keys of each row side by side, and attend to them densely, with rows of one length together."""
    batch, heads, q_tokens, channels = call.q_shape
    kv_heads, k_tokens = call.k_shape[1:3]
    q_count, k_count = call.block_counts
    q_RTD = _blocks(q, q_count, call.block_size)
    row = torch.arange(batch * heads * q_count)
    first_block_R = row // (q_count * (heads // kv_heads)) * k_count
    length_K = (k_tokens - call.block_size * torch.arange(k_count)).clamp(max=call.block_size)
    mask_RK = mask.flatten(0, 2)
    length_R, order_R = (mask_RK * length_K).sum(-1).sort()
    lengths, rows = length_R.unique_consecutive(return_counts=True)
    at_once = max(1, torch.get_num_threads() // _PIECES)
    take_k, take_v = (_taker(call, _blocks(x, k_count, call.block_size), at_once * k_count) for x in (k, v))
    outputs = []
    for length, same_length_R in zip(lengths.tolist(), order_R.split(rows.tolist()), strict=True):
        for chosen_R in same_length_R.split(at_once):
            index = mask_RK[chosen_R].nonzero()[:, 1].view(len(chosen_R), -1) + first_block_R[chosen_R, None]
            # The short block can only be the last one of a list: its padding stands behind the kept tokens.
            k_RLD, v_RLD = (take(index)[:, :length] for take in (take_k, take_v))
            outputs.append(_attend(q_RTD[chosen_R], k_RLD, v_RLD, call.scale))
    output_RTD = torch.cat(outputs)[order_R.argsort()]
    return output_RTD.view(batch, heads, -1, channels)[:, :, :q_tokens]


def _taker(call: SparseCall, blocks: Tensor, at_most: int) -> Callable[[Tensor], Tensor]:
    """Return a function from block numbers [R, n] to their tokens [R, n · size, D].

    Without a gradient all its results share their memory: fresh pages would cost as much as attention itself.
    """
    if call.needs_grad and torch.is_grad_enabled():
        return lambda index: blocks[index].flatten(1, 2)
    memory = blocks.new_empty(at_most, *blocks.shape[1:])

    def take(index: Tensor) -> Tensor:
        taken = torch.index_select(blocks, 0, index.flatten(), out=memory[: index.numel()])
        return taken.view(len(index), index.shape[1] * blocks.shape[1], blocks.shape[2])

    return take


def _blocks(x_BNSD: Tensor, count: int, size: int) -> Tensor:
    """Cut into blocks [B · N · count, size, D], the last one of a sequence padded with zeros."""
    padded = F.pad(x_BNSD, (0, 0, 0, count * size - x_BNSD.shape[2]))
    return padded.reshape(-1, size, x_BNSD.shape[3])


def _attend(q_RTD: Tensor, k_RLD: Tensor, v_RLD: Tensor, scale: float) -> Tensor:
    if k_RLD.shape[1] == 0:
        return torch.zeros_like(q_RTD)
    return F.scaled_dot_product_attention(q_RTD[:, None], k_RLD[:, None], v_RLD[:, None], scale=scale)[:, 0]


def _masked_sdpa(call: SparseCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Dense attention under the mask written out, for as many blocks of queries at once as the memory allows."""
    batch, heads, _, _ = call.q_shape
    size, k_tokens = call.block_size, call.k_shape[2]
    shared = heads != call.k_shape[1]
    if shared and call.device.type != "cpu":  # no kernel there takes both a mask and shared heads
        k, v = (each.repeat_interleave(heads // call.k_shape[1], dim=1) for each in (k, v))
        shared = False
    at_once = max(1, _MASKED // (batch * heads * k_tokens * size))
    outputs = []
    for number, q_part in enumerate(q.split(at_once * size, dim=2)):
        mask_part = mask[:, :, number * at_once : (number + 1) * at_once].repeat_interleave(size, dim=2)
        seen = mask_part[:, :, : q_part.shape[2]].repeat_interleave(size, dim=3)[..., :k_tokens]
        outputs.append(F.scaled_dot_product_attention(q_part, k, v, seen, scale=call.scale, enable_gqa=shared))
    return torch.cat(outputs, dim=2)


_FLEX_KINDS = CompiledPerKind(lambda: flex_attention)


def _flex(call: SparseCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    index, count = kept_lists(mask)
    blocks = BlockMask.from_kv_blocks(
        count.to(torch.int32),
        index.clamp(min=0).to(torch.int32),
        BLOCK_SIZE=call.block_size,
        seq_lengths=(call.q_shape[2], call.k_shape[2]),
    )
    gqa = call.q_shape[1] != call.k_shape[1]
    output: Tensor = _FLEX_KINDS.of(call)(q, k, v, block_mask=blocks, scale=call.scale, enable_gqa=gqa)
    return output


def _flex_missing() -> str | None:
    if "seq_lengths" not in inspect.signature(BlockMask.from_kv_blocks).parameters:
        return "FlexAttention of this torch takes no lengths that are not whole blocks"
    return compiler_missing()


def _npu_block_sparse(call: SparseCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    output: Tensor = torch.ops.npu.npu_block_sparse_attention(
        q,
        k,
        v,
        mask.to(torch.int8),
        [call.block_size, call.block_size],
        q_input_layout="BNSD",
        kv_input_layout="BNSD",
        num_key_value_heads=call.k_shape[1],
        scale_value=call.scale,
        inner_precise=call.inner_precise,
        actual_seq_lengths=None,
        actual_seq_lengths_kv=None,
        softmax_lse_flag=0,
    )[0]
    return output


def _npu_rain_fusion(call: SparseCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    batch, heads, q_tokens, _ = call.q_shape
    index_BNQK, count_BNQ = kept_lists(mask)
    output: Tensor = torch.ops.mindiesd.rainfusionattention(
        q,
        k,
        v,
        index_BNQK.transpose(1, 2).flatten(0, 1).contiguous(),
        count_BNQ.transpose(1, 2).flatten(0, 1).contiguous(),
        [call.block_size, call.block_size],
        attn_mask=None,
        actual_seq_qlen=[q_tokens] * batch,
        actual_seq_kvlen=[call.k_shape[2]] * batch,
        block_table=None,
        q_input_layout="BNSD",
        kv_input_layout="BNSD",
        head_num=heads,
        mask_type=0,
        scale=call.scale,
        inner_precise=call.inner_precise,
        block_size=0,
    )[0]
    return output


_PRECISE = Rule[SparseCall](
    lambda call: call.dtype != torch.bfloat16 or call.inner_precise == 0, "bfloat16 needs inner_precise=0"
)


def _npu_gradient_fits(call: SparseCall) -> bool:
    return not call.needs_grad or (call.q_shape[1] == call.k_shape[1] and call.q_shape[3] == 128)


_FLEX: Backend[SparseCall] = Backend(
    name="flex",
    run=_flex,
    devices=frozenset({"cuda"}),
    dtypes=FLOATS - {torch.float64},
    rules=(Rule(lambda call: call.q_shape[3] >= 16, "the head dim must be 16 or more"),),
    missing=_flex_missing,
    traceable=False,  # torch compiles it by itself
)

BACKENDS: tuple[Backend[SparseCall], ...] = (
    Backend(
        name="npu_block_sparse_attention",
        run=_npu_block_sparse,
        devices=frozenset({"npu"}),
        dtypes=HALVES,
        rules=(
            Rule(lambda call: call.q_shape[3] in (64, 128), "the head dim must be 64 or 128"),
            _PRECISE,
            Rule(_npu_gradient_fits, "for a gradient the head dim must be 128, and q and k have equally many heads"),
        ),
        missing=op_missing("npu", "npu_block_sparse_attention"),
        note="torch_npu 26.0 and later",
    ),
    Backend(
        name="rainfusionattention",
        run=_npu_rain_fusion,
        devices=frozenset({"npu"}),
        dtypes=HALVES,
        rules=(Rule(lambda call: call.q_shape[1] == call.k_shape[1], "q and k must have equally many heads"), _PRECISE),
        missing=op_missing("mindiesd", "rainfusionattention"),
        differentiable=False,
    ),
    Backend(
        name="gather",
        run=_gather,
        devices=frozenset({"cpu"}),
        traceable=False,  # how many keys a block of queries has is only known from the numbers
    ),
    _FLEX,
    # On cpu it is for whoever compares: `gather` needs no compiler, and has a gradient.
    replace(_FLEX, name="flex_cpu", devices=frozenset({"cpu"}), differentiable=False, costly=True),
    Backend(name="masked_sdpa", run=_masked_sdpa, note="skips nothing: as slow as dense attention with a mask"),
    Backend(name="naive", run=_naive, note="the reference, in float32"),
)
