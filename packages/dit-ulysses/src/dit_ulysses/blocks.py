"""Attention of some queries and one block of keys, and how blocks are put together again.

Softmax over all keys is a mean of the softmax over each block, weighted by how much of the whole sum of exponentials
lies in the block (arXiv 2112.05682, 2310.01889). A kernel therefore returns the logarithm of that sum beside its
output; `merge` does the rest, in fp32.

Kernels: `MATH`, plain torch in fp32, takes every device and every block; on an NPU it is what runs. `FLASH_CPU` and
`FLASH_CUDA` are torch's own, for blocks without a mask. `FLASH_CUDA` has not run on a device in our tests: what is
checked there, with fake tensors, is that torch takes its arguments.

Shape suffixes: B batch, N query heads, H key heads (they divide N), S queries, T keys of the block, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_SCORES = 2**24  # that exist at a time in `MATH`: 64 MiB
_CUDA_WIDTH = 256  # channels of a head that torch's CUDA flash attention goes up to, in steps of 8

Outputs = tuple[Tensor, Tensor]  # out_BNSD, and lse_BNS in fp32 (fp64 for fp64)
Gradients = tuple[Tensor, Tensor, Tensor]  # of q, k and v


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """How keys stand to queries.

    Attributes:
        scale: of the scores.
        diagonal: query i sees the keys up to ``i + diagonal``, counted inside of the block; None: all of them.
        mask: bool (True takes part) or float (added), broadcastable to [B, N, S, T].
    """

    scale: float
    diagonal: int | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BlockKernel:
    """Something that attends one block.

    Attributes:
        name: that tests and users know it by.
        takes: whether it takes q_BNSD, k_BHTD and a block. It is asked with at least one query and one key.
        forward: of q_BNSD, k_BHTD, v_BHTD and the block: out_BNSD, and the log-sum-exp of the scores, lse_BNS, to the
            base e. A query that sees no key has 0 and -inf.
        backward: of the gradient of out_BNSD, q, k, v, and of out and lse **over all blocks**: the gradients of q, k
            and v that this block adds.
    """

    name: str
    takes: Callable[[Tensor, Tensor, Block], bool]
    forward: Callable[[Tensor, Tensor, Tensor, Block], Outputs]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Block], Gradients]


def kernel_for(q_BNSD: Tensor, k_BHTD: Tensor, block: Block) -> BlockKernel:
    """Return the fastest kernel that takes a block."""
    return next(kernel for kernel in (FLASH_CPU, FLASH_CUDA, MATH) if kernel.takes(q_BNSD, k_BHTD, block))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def merge(out_BNSD: Tensor, lse_BNS: Tensor, block_out_BNSD: Tensor, block_lse_BNS: Tensor) -> Tensor:
    """Add a block to what was merged before, `out_BNSD` in place; return the new log-sum-exp.

    ``out = out · exp(lse - new) + block_out · exp(block_lse - new)``, ``new = log(exp(lse) + exp(block_lse))``. Start
    with zeros and -inf. A query that has seen no key yet keeps them.
    """
    new = torch.logaddexp(lse_BNS, block_lse_BNS)
    base = new.masked_fill(new == -torch.inf, 0)  # -inf - -inf is NaN
    out_BNSD.mul_((lse_BNS - base).exp_().unsqueeze(-1))
    out_BNSD.add_(block_out_BNSD * (block_lse_BNS - base).exp_().unsqueeze(-1))
    return new


def _math_forward(q_BNSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, block: Block) -> Outputs:
    k_BHTD, v_BHTD = (tensor.to(wide(q_BNSD.dtype)) for tensor in (k_BHTD, v_BHTD))
    out_BNSD = torch.empty_like(q_BNSD, dtype=k_BHTD.dtype)
    lse_BNS = k_BHTD.new_empty(q_BNSD.shape[:3])
    for start, end in _chunks(q_BNSD, k_BHTD):
        scores = _scores(q_BNSD, k_BHTD, block, start, end)
        lse = torch.logsumexp(scores, dim=-1)
        weights = scores.sub_(lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)).exp_()
        out_BNSD[:, :, start:end] = (_grouped(weights, k_BHTD) @ v_BHTD).view(*lse.shape, -1)
        lse_BNS[:, :, start:end] = lse
    return out_BNSD, lse_BNS


def _math_backward(
    grad_BNSD: Tensor, q_BNSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, out_BNSD: Tensor, lse_BNS: Tensor, block: Block
) -> Gradients:
    k_BHTD, v_BHTD = (tensor.to(wide(q_BNSD.dtype)) for tensor in (k_BHTD, v_BHTD))
    dq_BNSD = torch.empty_like(q_BNSD, dtype=k_BHTD.dtype)
    dk_BHTD, dv_BHTD = torch.zeros_like(k_BHTD), torch.zeros_like(v_BHTD)
    lse_BNS = lse_BNS.masked_fill(lse_BNS == -torch.inf, torch.inf)  # who sees nothing has weights 0
    for start, end in _chunks(q_BNSD, k_BHTD):
        grad, out, q = (x[:, :, start:end].to(k_BHTD.dtype) for x in (grad_BNSD, out_BNSD, q_BNSD))
        weights = _scores(q_BNSD, k_BHTD, block, start, end).sub_(lse_BNS[:, :, start:end].unsqueeze(-1)).exp_()
        grad_grouped = _grouped(grad, k_BHTD)
        dv_BHTD += _grouped(weights, k_BHTD).mT @ grad_grouped
        d_weights = (grad_grouped @ v_BHTD.mT).view(weights.shape)
        d_scores = weights.mul_(d_weights.sub_((grad * out).sum(-1, keepdim=True))).mul_(block.scale)
        d_scores = _grouped(d_scores, k_BHTD)
        dq_BNSD[:, :, start:end] = (d_scores @ k_BHTD).view(q.shape)
        dk_BHTD += d_scores.mT @ _grouped(q, k_BHTD)
    return dq_BNSD, dk_BHTD, dv_BHTD


def _chunks(q_BNSD: Tensor, k_BHTD: Tensor) -> Iterator[tuple[int, int]]:
    """Spans of queries that have few enough scores."""
    batch, heads, queries, _ = q_BNSD.shape
    rows = max(1, _SCORES // (batch * heads * k_BHTD.shape[2]))
    return ((start, min(start + rows, queries)) for start in range(0, queries, rows))


def _scores(q_BNSD: Tensor, k_BHTD: Tensor, block: Block, start: int, end: int) -> Tensor:
    """Scores of some queries, [B, N, end - start, T], -inf where they see nothing."""
    q = q_BNSD[:, :, start:end].to(k_BHTD.dtype) * block.scale
    scores = (_grouped(q, k_BHTD) @ k_BHTD.mT).view(*q.shape[:3], -1)
    if block.diagonal is not None:
        last = torch.arange(start, end, device=q.device) + block.diagonal
        hidden = torch.arange(scores.shape[-1], device=q.device) > last.unsqueeze(-1)
        scores.masked_fill_(hidden, -torch.inf)
    if block.mask is not None:
        mask = block.mask[:, :, start:end] if block.mask.shape[2] > 1 else block.mask
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores.add_(mask)
    return scores


def _grouped(x_BNSX: Tensor, k_BHTD: Tensor) -> Tensor:
    """Queries that share a key head, after each other, [B, H, N/H · S, X]: keys need not be repeated."""
    return x_BNSX.reshape(*k_BHTD.shape[:2], -1, x_BNSX.shape[-1])


def _cpu_takes(q_BNSD: Tensor, k_BHTD: Tensor, block: Block) -> bool:
    return (
        q_BNSD.device.type == "cpu"
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
        and q_BNSD.stride(-1) == k_BHTD.stride(-1) == 1
        and block.mask is None
        and block.diagonal in (None, 0)
    )


def _cpu_forward(q_BNSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, block: Block) -> Outputs:
    causal = block.diagonal is not None
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BNSD, k_BHTD, v_BHTD, 0.0, causal, scale=block.scale
    )
    return out, lse


def _cpu_backward(
    grad_BNSD: Tensor, q_BNSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, out_BNSD: Tensor, lse_BNS: Tensor, block: Block
) -> Gradients:
    causal = block.diagonal is not None
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_BNSD, q_BNSD, k_BHTD, v_BHTD, out_BNSD, lse_BNS, 0.0, causal, scale=block.scale
    )
    return dq, dk, dv


def _cuda_takes(q_BNSD: Tensor, k_BHTD: Tensor, block: Block) -> bool:
    return (
        q_BNSD.device.type == "cuda"
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward")
        and torch.cuda.get_device_capability(q_BNSD.device) >= (8, 0)
        and q_BNSD.dtype in (torch.float16, torch.bfloat16)
        and q_BNSD.stride(-1) == k_BHTD.stride(-1) == 1
        and q_BNSD.shape[-1] <= _CUDA_WIDTH
        and q_BNSD.shape[-1] % 8 == 0
        and block.mask is None
        # This kernel aligns the diagonal at the end of a rectangle, not at its start.
        and (block.diagonal is None or (block.diagonal == 0 and q_BNSD.shape[2] == k_BHTD.shape[2]))
    )


def _cuda_forward(q_BNSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, block: Block) -> Outputs:
    causal = block.diagonal is not None
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q_BNSD, k_BHTD, v_BHTD, 0.0, causal, False, scale=block.scale
    )
    return out, lse


def _cuda_backward(
    grad_BNSD: Tensor, q_BNSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, out_BNSD: Tensor, lse_BNS: Tensor, block: Block
) -> Gradients:
    causal = block.diagonal is not None
    seed, offset = (torch.empty(size, dtype=torch.uint64, device=q_BNSD.device) for size in (2, 0))  # of no dropout
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_BNSD, q_BNSD, k_BHTD, v_BHTD, out_BNSD, lse_BNS,
        None, None, q_BNSD.shape[2], k_BHTD.shape[2], 0.0, causal, seed, offset, scale=block.scale,
    )  # fmt: skip
    return dq, dk, dv


MATH = BlockKernel(name="math", takes=lambda q, k, block: True, forward=_math_forward, backward=_math_backward)
FLASH_CPU = BlockKernel(name="flash, CPU", takes=_cpu_takes, forward=_cpu_forward, backward=_cpu_backward)
FLASH_CUDA = BlockKernel(name="flash, CUDA", takes=_cuda_takes, forward=_cuda_forward, backward=_cuda_backward)
