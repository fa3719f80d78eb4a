"""What block-sparse attention is, in plain float32 torch: the truth that every backend is held against.

Shape suffixes: B batch, N heads, M heads of keys (M divides N), S tokens, D channels of a head, Q blocks of queries,
K blocks of keys, T tokens of one block of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_sparse_attention_naive(
    q_BNSD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, mask_BNQK: Tensor, *, scale: float, block_size: int = 128
) -> Tensor:
    """Return ``softmax(scale · q kᵀ) v`` where each block of queries sees the kept blocks of keys alone.

    One block of queries at a time, so that no matrix of all queries by all keys is made.

    Args:
        q_BNSD: queries [B, N, Sq, D].
        k_BMSD: keys [B, M, Sk, D]; head n of the queries sees head ``n // (N / M)``.
        v_BMSD: values, of the shape of the keys.
        mask_BNQK: bool [B, N, ceil(Sq / block_size), ceil(Sk / block_size)], True keeps.
        scale: of the scores.
        block_size: tokens of a block; the last one of a side may be short.

    Returns:
        float32, or float64 for float64 input, of the shape of the queries; 0 where a block of queries keeps nothing.
    """
    dtype = torch.float64 if q_BNSD.dtype == torch.float64 else torch.float32
    heads = q_BNSD.shape[1] // k_BMSD.shape[1]
    k_BNSD, v_BNSD = (x.to(dtype).repeat_interleave(heads, dim=1) for x in (k_BMSD, v_BMSD))
    outputs = []
    for number, q_BNTD in enumerate(q_BNSD.to(dtype).split(block_size, dim=2)):
        seen_BNS = mask_BNQK[:, :, number].repeat_interleave(block_size, dim=-1)[..., : k_BNSD.shape[2]]
        score_BNTS = (q_BNTD @ k_BNSD.mT * scale).masked_fill(~seen_BNS[:, :, None], float("-inf"))
        sees_any = seen_BNS.any(-1)[..., None, None]
        weight_BNTS = score_BNTS.masked_fill(~sees_any, 0.0).softmax(-1) * sees_any
        outputs.append(weight_BNTS @ v_BNSD)
    return torch.cat(outputs, dim=2)
