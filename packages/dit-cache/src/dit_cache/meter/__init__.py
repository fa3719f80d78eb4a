"""Know what a cache saves and what it costs.

`FlopMeter` counts what was executed, `compare` says how far the outcome is from the one without cache, a `Ledger` holds
what was decided and why, and `plot_front` draws methods against one another.
"""

from __future__ import annotations

from dit_cache.meter.compare import Comparison, Scores, compare
from dit_cache.meter.flops import FlopMeter, flops_share
from dit_cache.meter.ledger import Entry, Ledger
from dit_cache.meter.plots import plot_front

__all__ = [
    "FlopMeter",
    "flops_share",
    "compare",
    "Comparison",
    "Scores",
    "Ledger",
    "Entry",
    "plot_front",
]
