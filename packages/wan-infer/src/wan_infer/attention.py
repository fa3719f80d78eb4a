"""The one place where attention is computed; a faster kernel replaces this function and nothing else."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: B batch, S query tokens, T key tokens, N heads, D channels of a head.


def attention(q_BSND: Tensor, k_BTND: Tensor, v_BTND: Tensor, *, key_bias_T: Tensor | None = None) -> Tensor:
    """Return ``softmax(q kᵀ / √D + key_bias) v`` of each head, [B, S, N, D].

    Args:
        q_BSND: queries.
        k_BTND: keys.
        v_BTND: values.
        key_bias_T: added to the score of each key, in the dtype of the queries; ``log(n)`` makes a key count n times.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSND, k_BTND, v_BTND))
    bias = None if key_bias_T is None else key_bias_T.expand(1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
