"""Which micro-batches a pipeline stage holds at a time: Megatron's 1F1B schedule and the interleaved one.

Stage ``p`` of ``P`` runs ``P - p - 1`` micro-batches forwards before its first one backwards (arXiv 1806.03377,
2104.04473); with ``V`` virtual stages ``2 (P - p - 1) + (V - 1) P`` parts of micro-batches, which go through its parts
in groups of P.
"""

from __future__ import annotations

from collections.abc import Iterator


def events(stage: int, stages: int, parts: int, micro_batches: int) -> Iterator[tuple[int, bool]]:
    """What a stage does, in order: ``(part, forwards)``; backwards it takes the oldest one that the part holds.

    Args:
        stage: of the pipeline.
        stages: of them.
        parts: virtual stages of each.
        micro_batches: of a step; with several parts a multiple of `stages`.
    """
    forwards = _order(stages, parts, micro_batches)
    total = len(forwards)
    ahead = stages - stage - 1 if parts == 1 else 2 * (stages - stage - 1) + (parts - 1) * stages
    ahead = min(ahead, total)
    for part in forwards[:ahead]:
        yield part, True
    for number in range(total):
        if ahead + number < total:
            yield forwards[ahead + number], True
        yield parts - 1 - forwards[number], False


def _order(stages: int, parts: int, micro_batches: int) -> list[int]:
    if parts == 1:
        return [0] * micro_batches
    return [part for _ in range(0, micro_batches, stages) for part in range(parts) for _ in range(stages)]
