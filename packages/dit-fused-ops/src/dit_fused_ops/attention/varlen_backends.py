"""Attention of sequences one after the other. Each `run(call, q, k, v, cu_seqlens_q, cu_seqlens_k)` returns [T, N, E],
and with `call.lse` the pair of it and [N, T]; the bounds are None where `call` holds them.

Shape suffixes: as in `varlen`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.attention.cuda_backends import negative_infinities
from dit_fused_ops.attention.npu_backends import kernel_missing, window_mask
from dit_fused_ops.attention.probe import MOST_ROWS, both
from dit_fused_ops.attention.reference import attention_naive, query_positions, visible_keys
from dit_fused_ops.attention.torch_backends import (
    HELD_SCORES,
    NOT_HELD_IN_VAIN,
    SAME_BITS,
    math_in_blocks,
    sdpa_BNSE,
)
from dit_fused_ops.attention.varlen_call import Bounds, VarlenCall
from dit_fused_ops.dispatch import HALVES, Backend, Probe, Rule, spread_rows
from dit_fused_ops.platform import DUO, flash_attn_missing

# attend(call, q_BNSD, k_BKSD, v_BKSE) -> out_BNSE, lse_BNS or None
Attend = Callable[[VarlenCall, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Run:
    """`count` neighbouring sequences of the same lengths: their tokens, and how many each has."""

    q: slice
    k: slice
    count: int
    queries: int
    keys: int


def equal_runs(q_bounds: Bounds, k_bounds: Bounds) -> Iterator[Run]:
    """Sequences of equal lengths can be computed as one batch."""
    first = 0
    lengths = zip(
        *(itertools.starmap(_length, itertools.pairwise(bounds)) for bounds in (q_bounds, k_bounds)), strict=True
    )
    for (queries, keys), same in itertools.groupby(lengths):
        last = first + len(list(same))
        q, k = (slice(bounds[first], bounds[last]) for bounds in (q_bounds, k_bounds))
        yield Run(q, k, last - first, queries, keys)
        first = last


def _length(start: int, stop: int) -> int:
    return stop - start


def host_bounds(call: VarlenCall, cu_q: Tensor | None, cu_k: Tensor | None) -> tuple[Bounds, Bounds]:
    """The bounds on the host; read from the device, which then is waited for, where they are there."""
    q_bounds = call.q_bounds if cu_q is None else tuple(cu_q.tolist())
    k_bounds = call.k_bounds if cu_k is None else tuple(cu_k.tolist())
    assert q_bounds is not None, "bounds are in the call or in a tensor"
    assert k_bounds is not None, "bounds are in the call or in a tensor"
    return q_bounds, k_bounds


def _per_sequence(attend: Attend) -> Callable[..., Any]:
    def run(
        call: VarlenCall, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        outs, lses = [], []
        for each in equal_runs(*host_bounds(call, cu_q, cu_k)):
            q_BNSD = _batch(q[each.q], each.count, each.queries)
            k_BKSD, v_BKSE = (_batch(x[each.k], each.count, each.keys) for x in (k, v))
            out, lse = (attend if each.keys else _eager)(call, q_BNSD, k_BKSD, v_BKSE)
            outs.append(out.transpose(1, 2).flatten(0, 1))
            lses.append(lse.transpose(0, 1).flatten(1).float() if call.lse and lse is not None else q.new_zeros(0))
        if not outs:
            outs, lses = [v.new_zeros(0, call.heads, call.value_dim)], [q.new_zeros(call.heads, 0).float()]
        joined = outs[0] if len(outs) == 1 else torch.cat(outs)
        if not call.lse:
            return joined
        return joined, lses[0] if len(lses) == 1 else torch.cat(lses, dim=1)

    return run


def _batch(x_TND: Tensor, count: int, tokens: int) -> Tensor:
    batch: Tensor = x_TND.unflatten(0, (count, tokens))
    return batch.transpose(1, 2)


def _sdpa(call: VarlenCall, q_BNSD: Tensor, k_BKSD: Tensor, v_BKSE: Tensor) -> tuple[Tensor, None]:
    queries, keys = q_BNSD.shape[2], k_BKSD.shape[2]
    flag = call.causal and queries == keys
    mask = None if flag else visible_keys(query_positions(queries, keys, q_BNSD.device), keys, call.window, None)
    return sdpa_BNSE(call, q_BNSD, k_BKSD, v_BKSE, mask, flag), None


def _eager(call: VarlenCall, q_BNSD: Tensor, k_BKSD: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
    return math_in_blocks(q_BNSD, k_BKSD, v_BKSE, scale=call.scale, window=call.window, softcap=call.softcap)


def _naive(call: VarlenCall, q_BNSD: Tensor, k_BKSD: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    out, lse = _eager(call, *(x.to(wide) for x in (q_BNSD, k_BKSD, v_BKSE)))
    return out.to(call.dtype), lse


def _flash_attn(
    call: VarlenCall, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_varlen_func

    (cu_q, longest_q), (cu_k, longest_k) = (
        _device_bounds(*given, q.device)
        for given in ((cu_q, call.q_bounds, call.longest_q), (cu_k, call.k_bounds, call.longest_k))
    )
    returned = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_q,
        cu_k,
        longest_q,
        longest_k,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=(-1, -1) if call.causal else call.window,
        softcap=call.softcap,
        deterministic=call.deterministic,
        return_attn_probs=call.lse,
    )
    return (returned[0], negative_infinities(returned[1])) if call.lse else returned


def _device_bounds(
    tensor: Tensor | None, bounds: Bounds | None, longest: int | None, device: torch.device
) -> tuple[Tensor, int]:
    if tensor is None:
        assert bounds is not None, "bounds are in the call or in a tensor"
        assert longest is not None, "it is known where bounds are"
        return torch.tensor(bounds, dtype=torch.int32, device=device), longest
    return tensor.int(), int(tensor.diff().max()) if longest is None else longest


def _npu_fusion(call: VarlenCall, q: Tensor, k: Tensor, v: Tensor, cu_q: None, cu_k: None) -> Tensor:
    how = window_mask(call.window, q.device)
    ends = [pair for pair in zip(*(bounds[1:] for bounds in host_bounds(call, None, None)), strict=True) if any(pair)]
    q_ends, k_ends = zip(*dict.fromkeys(ends), strict=True)  # an empty sequence ends where the one before it does
    out: Tensor = torch.ops.npu.npu_fusion_attention(
        q,
        k,
        v,
        call.heads,
        "TND",
        atten_mask=how.hidden,
        scale=call.scale,
        pre_tockens=how.before,
        next_tockens=how.after,
        actual_seq_qlen=list(q_ends),
        actual_seq_kvlen=list(k_ends),
        sparse_mode=how.mode,
    )[0]
    return out


def _every_query_sees_a_key(call: VarlenCall) -> bool:
    if call.q_bounds is None or call.k_bounds is None:
        return False
    return bool(call.queries) and all(
        bool(each.queries) == bool(each.keys) and not (call.causal and each.queries > each.keys)
        for each in equal_runs(call.q_bounds, call.k_bounds)
    )


def probe_varlen(call: VarlenCall, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Probe:
    """Compare up to 64 queries, spread over all sequences, each with all of its keys."""
    rows = spread_rows(call.queries, MOST_ROWS, q.device)
    outs, lses = [v.new_zeros(0, call.heads, call.value_dim)], [q.new_zeros(call.heads, 0)]
    pairs = zip(*map(itertools.pairwise, host_bounds(call, cu_q, cu_k)), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in pairs:
        own = rows[(rows >= q_start) & (rows < q_stop)]
        if not own.numel():
            continue
        positions = query_positions(q_stop - q_start, k_stop - k_start, q.device)[own - q_start]
        out, lse = attention_naive(
            *(_batch(x, 1, x.shape[0]) for x in (q[own], k[k_start:k_stop], v[k_start:k_stop])),
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            positions=positions,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    wanted, lse = torch.cat(outs), torch.cat(lses, dim=1)
    if not call.lse:
        return Probe(select=lambda output: output.index_select(0, rows), wanted=wanted)
    return both(wanted, lse, lambda pair: (pair[0].index_select(0, rows), pair[1].index_select(1, rows)))


IN_SDPA = frozenset({"causal", "window", "gqa", "value dim"})
EVERYTHING = IN_SDPA | {"softcap", "lse", "gradient of the lse"}
VARLEN_BACKENDS: tuple[Backend[VarlenCall], ...] = (
    Backend(
        name="fused_attn_score",
        run=_npu_fusion,
        devices=frozenset({"npu"}),
        dtypes=HALVES | {torch.float32},
        honours=frozenset({"causal", "gqa"}),
        rules=(
            SAME_BITS,
            Rule(lambda call: call.heads <= 256, "at most 256 heads"),
            Rule(lambda call: call.head_dim <= 768, "the head dim must be up to 768"),
            Rule(_every_query_sees_a_key, "every query must see a key"),
        ),
        missing=kernel_missing("npu", "npu_fusion_attention", DUO),
    ),
    Backend(
        name="flash_attn",
        run=_flash_attn,
        devices=frozenset({"cuda"}),
        dtypes=HALVES,
        honours=frozenset({"causal", "window", "softcap", "lse", "gqa"}),
        rules=(Rule(lambda call: call.head_dim <= 256, "the head dim must be up to 256"),),
        missing=flash_attn_missing,
        traceable=False,
    ),
    Backend(
        name="sdpa",
        run=_per_sequence(_sdpa),
        honours=IN_SDPA,
        rules=(SAME_BITS,),
        note="one call for each run of equal lengths",
    ),
    Backend(
        name="eager",
        run=_per_sequence(_eager),
        honours=EVERYTHING,
        rules=(
            Rule(
                lambda call: call.scores <= HELD_SCORES or call.named or not call.features <= IN_SDPA,
                NOT_HELD_IN_VAIN,
            ),
        ),
        note="plain products; for what no kernel does",
    ),
    Backend(
        name="naive",
        run=_per_sequence(_naive),
        honours=EVERYTHING,
        note="the reference, in float32",
    ),
)
