"""What of a big attention the reference can compute: some queries against all keys.

Shape suffixes: as in `reference`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_fused_ops.attention.call import AttentionCall
from dit_fused_ops.attention.masks import given_mask
from dit_fused_ops.attention.reference import attention_naive, query_positions
from dit_fused_ops.dispatch import Probe, spread_rows

MOST_ROWS = 64
MOST_SCORES = 1 << 26  # 256 MiB in float32


def probe_attention(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> Probe:
    """Compare up to 64 queries, spread from the first to the last."""
    axis = call.layout.index("S")
    most = max(1, MOST_SCORES * call.queries // max(call.scores, 1))
    rows = spread_rows(call.queries, min(MOST_ROWS, most), q.device)
    if call.layout == "BSND":
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    given = given_mask(call, mask)
    if given is not None and given.shape[2] != 1:
        given = given.index_select(2, rows)
    out, lse = attention_naive(
        q.index_select(2, rows),
        k,
        v,
        given,
        scale=call.scale,
        window=call.window,
        key_lengths=lengths,
        positions=query_positions(call.queries, call.keys, q.device)[rows],
    )
    out = out.transpose(1, 2) if call.layout == "BSND" else out
    if not call.lse:
        return Probe(select=lambda output: output.index_select(axis, rows), wanted=out)
    return both(out, lse, lambda pair: (pair[0].index_select(axis, rows), pair[1].index_select(2, rows)))


def both(out: Tensor, lse: Tensor, select: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]) -> Probe:
    """A probe of output and logarithm, each in units of its own largest number, as one tensor."""
    units = [_largest(part) for part in (out, lse)]

    def joined(pair: tuple[Tensor, Tensor]) -> Tensor:
        parts = (part.to(out.dtype) / unit for part, unit in zip(pair, units, strict=True))
        return torch.cat([part.flatten() for part in parts])

    return Probe(select=lambda pair: joined(select(pair)), wanted=joined((out, lse)))


def _largest(x: Tensor) -> Tensor:
    finite = x.abs().where(x.isfinite(), 0)
    return finite.amax().clamp_min(1e-30) if x.numel() else torch.ones((), dtype=x.dtype, device=x.device)
