"""Where a conversation is cut that is longer than the sequence length."""

from __future__ import annotations

from collections.abc import Sequence


def kept_lengths(
    pairs: Sequence[tuple[int, int]], seq_length: int, *, last_first: bool = False
) -> list[tuple[int, int]]:
    """Return how many tokens of each question and answer stay, given their lengths; heads stay, tails go.

    The rule of MindSpeed MM and LLaMA-Factory: the turns get what is left of ``seq_length`` in their order, or from the
    last one on (``last_first``: with ``mask_history``). Within a turn a short answer is spared, else a short question,
    else both shrink in proportion.
    """
    left = seq_length
    kept = []
    for source, target in reversed(pairs) if last_first else pairs:
        kept.append(_shares(source, target, left) if left > 0 else (0, 0))
        left -= sum(kept[-1])
    return kept[::-1] if last_first else kept


def _shares(source: int, target: int, budget: int) -> tuple[int, int]:
    if 2 * target < budget:
        allowance = budget
    elif 2 * source < budget:
        allowance = budget - source
    else:
        allowance = int(budget * (target / (source + target)))
    kept_target = min(allowance, target)
    return min(max(budget - kept_target, 0), source), kept_target
