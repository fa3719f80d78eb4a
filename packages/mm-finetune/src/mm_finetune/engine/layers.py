"""The layers that megatron-core takes from us through its layer specification.

Shape suffixes: S tokens, B batch, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from mm_finetune.engine.attention import Rows, packed_attention


class RMSNorm(nn.Module):
    """Root mean square norm, in float32 inside: ``weight * x / sqrt(mean(x²) + eps)``.

    Megatron's own local norm refuses sequence parallelism; all that it takes is the mark on the weight,
    by which Megatron sums its gradient over tensor-parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Any shape whose last dimension is the hidden size."""
        norm = NORMS.get(hidden_states.device.type, _torch_rms_norm)
        return norm(hidden_states, self.weight, self.eps)


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight.shape, weight, eps)


def _npu_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The vendor's operator; it also gives the reciprocal root, which only its backward pass needs."""
    out: Tensor = torch.ops.npu.npu_rms_norm(x, weight, eps)[0]
    return out


NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"npu": _npu_rms_norm}


@dataclass
class PackedRow(PackedSeqParams):
    """Where a packed row's samples are, on its way through Megatron's layers.

    Megatron is told that rows are ordinary (``sbhd``): its own ``thd`` would rotate queries and keys sample by
    sample, by positions of its own making, while M-RoPE's stand in the batch.
    """

    qkv_format: str = "sbhd"
    rows: Rows | None = None


class CoreAttention(nn.Module):
    """Causal attention, grouped queries included; within each sample of a packed row.

    Padding stands on the right, where a causal mask keeps it from every token that counts; so no mask
    of ``[S, S]`` is ever made.
    """

    def __init__(self, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: PackedRow | None = None,
        **_: Any,
    ) -> Tensor:
        """``[S, B, H, D]`` each, key and value with fewer heads; returns ``[S, B, H * D]``."""
        if attention_mask is not None:
            raise ValueError("CoreAttention is causal and takes no mask")
        tokens, batch = query.shape[:2]
        rows = packed_seq_params.rows if packed_seq_params else None
        if rows is None:
            rows = Rows.equal(batch, tokens, query.device)
        q_THD, k_THD, v_THD = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        out_THD = packed_attention(q_THD, k_THD, v_THD, rows, self.softmax_scale)
        out_BSH: Tensor = out_THD.flatten(1).unflatten(0, (batch, tokens))
        return out_BSH.transpose(0, 1)
