"""Attention over a sequence that is spread over ranks, exact for any number of heads and any length.

Wrap your own attention; heads are exchanged for tokens around it::

    out = ulysses_attention(q, k, v, group=group, attention=my_attention, lengths=lengths)

Where there are more ranks than heads, or nodes between them, keys and values go round in a ring, or both::

    out = ring_attention(q, k, v, group=group, lengths=lengths)
    out = usp_attention(q, k, v, mesh=mesh, lengths=lengths)          # mesh: ("ring", "ulysses")

Around it, in your own script::

    plan = ParallelPlan.auto(world, heads=12, tokens=32760, guided=True)
    mesh = plan.mesh("cuda")
    x = split_sequence(x, 1, group=group)
    x = gather_sequence(x, 1, group=group, lengths=lengths)
    cond, uncond = cfg_parallel(cond_fn, uncond_fn, group=mesh.get_group("cfg"))

What a rank really sends is counted by a `WireMeter`. Ranks that disagree find out before anything is sent, all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_ulysses.cfg import cfg_parallel
    from dit_ulysses.costs import Costs
    from dit_ulysses.errors import (
        DisagreementError,
        GroupError,
        LostRankError,
        PlanError,
        ShapeError,
        UlyssesError,
    )
    from dit_ulysses.estimate import Workload
    from dit_ulysses.halo import halo_exchange
    from dit_ulysses.plan import ParallelPlan
    from dit_ulysses.ring import ring_attention
    from dit_ulysses.sequence import gather_sequence, sequence_lengths, split_sequence
    from dit_ulysses.ulysses import ulysses_attention
    from dit_ulysses.usp import usp_attention
    from dit_ulysses.wire import WireMeter

# Where each public name lives; torch is imported when the first of them is used.
_HOMES = {
    "ulysses_attention": "ulysses",
    "ring_attention": "ring",
    "usp_attention": "usp",
    "split_sequence": "sequence",
    "gather_sequence": "sequence",
    "sequence_lengths": "sequence",
    "cfg_parallel": "cfg",
    "halo_exchange": "halo",
    "ParallelPlan": "plan",
    "Workload": "estimate",
    "Costs": "costs",
    "WireMeter": "wire",
    "UlyssesError": "errors",
    "PlanError": "errors",
    "ShapeError": "errors",
    "GroupError": "errors",
    "DisagreementError": "errors",
    "LostRankError": "errors",
}

__all__ = [
    "ulysses_attention",
    "ring_attention",
    "usp_attention",
    "split_sequence",
    "gather_sequence",
    "sequence_lengths",
    "cfg_parallel",
    "halo_exchange",
    "ParallelPlan",
    "Workload",
    "Costs",
    "WireMeter",
    "UlyssesError",
    "PlanError",
    "ShapeError",
    "GroupError",
    "DisagreementError",
    "LostRankError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
