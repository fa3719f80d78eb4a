"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks, without ever holding all logits.

Only positions that carry loss are worked on, some at a time; the gradient is made in the same pass, so that
nothing of the size ``tokens x vocabulary`` outlives a chunk.

Shape suffixes: N positions that carry loss, H hidden size, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The logits of a chunk are CHUNK x V float32: 0.6 GB for the 152k entries of Qwen2.5-VL on one rank.
CHUNK = 1024


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    loss_weights_N: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """``sum(loss_weights * -log softmax(hidden @ weight.T)[labels])`` in float32.

    The gradient of `hidden_NH` is this rank's share; whoever handed out `hidden_NH` to the ranks sums it.
    If `weight_VH` has Megatron's ``main_grad``, its gradient is added there, in float32.

    Args:
        hidden_NH: the same on every rank of `group`.
        weight_VH: this rank's rows; each rank of `group` has equally many.
        labels_N: numbers in the whole vocabulary.
        loss_weights_N: float32.
        group: ranks that the vocabulary is cut over; None: it is whole.
        chunk: positions that are worked on together.

    Returns:
        A scalar, the same on every rank of `group`.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden_NH, weight_VH, labels_N, loss_weights_N, group, chunk)
    return loss


@torch.no_grad()
def linear_token_losses(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """``-log softmax(hidden @ weight.T)[labels]`` of each position in float32, without gradients.

    The arguments are those of :func:`linear_cross_entropy`.
    """
    losses_N = hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32)
    for start in range(0, len(hidden_NH), chunk):
        part = slice(start, start + chunk)
        losses_N[part] = logits_cross_entropy((hidden_NH[part] @ weight_VH.t()).float(), labels_N[part], group)
    return losses_N


def logits_cross_entropy(logits_NV: Tensor, labels_N: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Loss of each position; `logits_NV` (float32) is overwritten with ``softmax - one_hot(labels)``."""
    top_N = _reduced(logits_NV.amax(-1), dist.ReduceOp.MAX, group)
    first = logits_NV.shape[-1] * (dist.get_rank(group) if group else 0)
    local_N = labels_N - first
    here_N = (local_N >= 0) & (local_N < logits_NV.shape[-1])
    at_N1 = local_N.where(here_N, 0)[:, None]
    logits_NV.sub_(top_N[:, None])
    target_N = logits_NV.gather(-1, at_N1)[:, 0].where(here_N, 0.0)
    logits_NV.exp_()
    total_N, target_N = _reduced(torch.stack([logits_NV.sum(-1), target_N]), dist.ReduceOp.SUM, group)
    logits_NV.div_(total_N[:, None])
    logits_NV.scatter_add_(-1, at_N1, -here_N.float()[:, None])
    losses_N: Tensor = total_N.log() - target_N
    return losses_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        loss_weights_N: Tensor,
        group: dist.ProcessGroup | None,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        weight_grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_NH), chunk):
            part = slice(start, start + chunk)
            logits_NV = (hidden_NH[part] @ weight_VH.t()).float()
            loss += logits_cross_entropy(logits_NV, labels_N[part], group) @ loss_weights_N[part]
            grad_NV = logits_NV.mul_(loss_weights_N[part, None]).to(weight_VH.dtype)
            # Each is let go before the next large tensor is made: the weight's product here, another chunk below.
            del logits_NV
            if hidden_grad_NH is not None:
                torch.mm(grad_NV, weight_VH, out=hidden_grad_NH[part])
            if weight_grad_VH is not None:
                _add_product(weight_grad_VH, grad_NV.t(), hidden_NH[part])
            del grad_NV
        ctx.save_for_backward(hidden_grad_NH, weight_grad_VH)
        ctx.weight = weight_VH
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_NH, weight_grad_VH = ctx.saved_tensors
        hidden_grad = None if hidden_grad_NH is None else hidden_grad_NH * scale.to(hidden_grad_NH.dtype)
        weight_grad = None if weight_grad_VH is None else _weight_gradient(ctx.weight, weight_grad_VH.mul_(scale))
        return hidden_grad, weight_grad, None, None, None, None


def _add_product(sum_VH: Tensor, left_VN: Tensor, right_NH: Tensor) -> None:
    if right_NH.dtype == sum_VH.dtype:
        sum_VH.addmm_(left_VN, right_NH)
    else:
        sum_VH.add_(left_VN @ right_NH)


def _weight_gradient(weight_VH: Tensor, grad_VH: Tensor) -> Tensor:
    """The gradient that autograd gets; where the weight has ``main_grad``, it went there instead."""
    if not hasattr(weight_VH, "main_grad"):
        return grad_VH.to(weight_VH.dtype)
    weight_VH.main_grad.add_(grad_VH)
    if getattr(weight_VH, "zero_out_wgrad", False):
        # Megatron's mark of a tied weight: the embedding's gradient is added to what is returned here.
        return torch.zeros_like(weight_VH)
    # Megatron's word for "leave .grad alone"; autograd must still be given one of the right shape.
    weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight_VH)


def _reduced(values: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
    return values
