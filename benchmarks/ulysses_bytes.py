"""How many bytes does a rank send for one attention, by the way in which it is spread over ranks?

    python benchmarks/ulysses_bytes.py

Everything runs, on gloo, and a `WireMeter` counts. Tensor parallel is three all-reduces of the tokens (after attention,
cross-attention and the feed-forward layer), each one a sum that is scattered and a gathering.
"""

from __future__ import annotations

import sys

import torch
from ulysses import Case, attend, on_ranks, spread

from dit_ulysses import WireMeter, gather_sequence, ring_attention, ulysses_attention

CASE = Case(tokens=7800, heads=12)  # 17 frames of 480 × 832 of Wan2.1 1.3B, one attention
RANKS = (2, 4, 8)
ALL_REDUCES = 3


def sent() -> dict[str, int]:
    """Return the bytes that the first rank sends, by way."""
    q, k, v, lengths = spread(CASE)
    meters = {name: WireMeter() for name in ("Ulysses", "ring", "all-gather", "tensor parallel")}
    with torch.no_grad():
        with meters["Ulysses"]:
            ulysses_attention(q, k, v, group=None, attention=attend, lengths=lengths)
        with meters["ring"]:
            ring_attention(q, k, v, group=None, lengths=lengths)
        with meters["all-gather"]:
            for tensor in (k, v):
                gather_sequence(tensor, 1, group=None, lengths=lengths)
    with meters["tensor parallel"]:
        for _ in range(ALL_REDUCES):
            whole = gather_sequence(q.clone().requires_grad_(), 1, group=None, lengths=lengths, gradient="sum")
            torch.autograd.backward(whole, torch.ones_like(whole))
    return {name: meter.total for name, meter in meters.items()}


def main() -> int:
    """Measure, and print a table."""
    whole = CASE.tokens * CASE.heads * CASE.width * 2
    print(f"{CASE}; MB that a rank sends, and the formula with S·C·b = {whole / 1e6:.2f} MB")
    print(
        "| ranks | Ulysses, 4·S·C·b·(P−1)/P² | ring, all-gather: 2·S·C·b·(P−1)/P | tensor parallel: 6·S·C·b·(P−1)/P |"
    )
    print("|---|---|---|---|")
    for ranks in RANKS:
        found = on_ranks(ranks, sent)
        part = whole * (ranks - 1) / ranks
        wanted = (4 * part / ranks, 2 * part, 2 * part, 2 * ALL_REDUCES * part)
        cells = [f"{found[name] / 1e6:.2f} ({of / 1e6:.2f})" for name, of in zip(found, wanted, strict=True)]
        print(f"| {ranks} | {cells[0]} | {cells[1]}; {cells[2]} | {cells[3]} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
