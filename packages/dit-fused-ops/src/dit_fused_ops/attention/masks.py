"""Masks in the form that kernels take, and what keeps a kernel safe from queries that see no key.

Shape suffixes: as in `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_fused_ops.attention.call import AttentionCall
from dit_fused_ops.attention.reference import UNBOUNDED, query_positions, visible_keys


def given_mask(call: AttentionCall, mask: Tensor | None) -> Tensor | None:
    """The mask of the call in four dimensions: truth values where it selects, numbers where it is added."""
    if mask is None or call.mask_shape is None:
        return None
    mask = mask.reshape(call.mask_shape)
    return mask if call.mask_kind == "bias" or mask.dtype == torch.bool else mask != 0


def whole_mask(call: AttentionCall, q: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Mask, window and lengths in one, [B or 1, N or 1, S or 1, T]: True is visible, numbers are added; None: all."""
    given = given_mask(call, mask)
    if call.window == UNBOUNDED and lengths is None:
        return given
    visible = visible_keys(query_positions(call.queries, call.keys, q.device), call.keys, call.window, lengths)
    if given is None or visible is None:
        return visible
    return given & visible if call.mask_kind == "mask" else given.masked_fill(~visible, -torch.inf)


def open_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask that shows every key to the queries which saw none, and which queries saw one, [..., S, 1].

    Kernels differ in what they make of a query without keys (0, a mean, NaN), forward and backward. With this mask they
    never meet one; `close_rows` then puts the 0 there, and cuts the gradient.
    """
    seeing = (mask if mask.dtype == torch.bool else mask > -torch.inf).any(-1, keepdim=True)
    if mask.dtype == torch.bool:
        return mask | ~seeing, seeing
    return mask.masked_fill(~seeing, 0), seeing


def close_rows(out: Tensor, seeing: Tensor) -> Tensor:
    """Put 0 where a query sees no key."""
    return out.masked_fill(~seeing, 0)


def close_lse(lse_BNS: Tensor, seeing: Tensor) -> Tensor:
    """Put -inf where a query sees no key."""
    return lse_BNS.masked_fill(~seeing.squeeze(-1), -torch.inf)
