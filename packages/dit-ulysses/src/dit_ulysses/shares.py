"""How heads and tokens are shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from dit_ulysses.errors import ShapeError

Lengths = Sequence[int]  # tokens of each rank


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Return how many each part gets: 12 in 8 parts are 2, 2, 2, 2, 1, 1, 1, 1."""
    each, more = divmod(total, parts)
    return tuple(each + (part < more) for part in range(parts))


def spans(lengths: Lengths) -> list[tuple[int, int]]:
    """Return (start, end) of each part: those of 2, 2, 1 are (0, 2), (2, 4), (4, 5)."""
    ends = list(accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def check_lengths(lengths: Lengths | None, size: int, rank: int, here: int, what: str) -> tuple[int, ...]:
    """Return the lengths of all ranks; those of this rank when none are given.

    Raises:
        ShapeError: they are not one for each rank, or this rank holds another number of tokens.
    """
    if lengths is None:
        return (here,) * size
    if len(lengths) != size or any(length < 0 for length in lengths):
        raise ShapeError(f"{what} is {list(lengths)}; {size} numbers of tokens are expected, one for each rank")
    if lengths[rank] != here:
        raise ShapeError(
            f"{what} is {list(lengths)}, and rank {rank} of the group holds {here} tokens, not {lengths[rank]}"
        )
    return tuple(lengths)


def lengths_fact(lengths: Lengths | None, here: int, what: str) -> dict[str, object]:
    """Return what the ranks have to agree on: the lengths, or where none are given, that all are as long as this."""
    return {f"tokens, without {what}": here} if lengths is None else {what: list(lengths)}


@dataclass(frozen=True)
class HeadShare:
    """The heads that one rank attends, and the key and value heads that they need.

    Attributes:
        start, end: of the query heads.
        kv_start, kv_end: of the key and value heads; several ranks may need one.
        index: for each query head its key and value head, counted from `kv_start`; None where query heads follow each
            other in groups of one size, as kernels expect it.
    """

    start: int
    end: int
    kv_start: int
    kv_end: int
    index: tuple[int, ...] | None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.end - self.start

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_end - self.kv_start


def head_share(heads: int, kv_heads: int, start: int, end: int) -> HeadShare:
    """Return what the query heads from `start` to `end` need, of `heads` in groups of ``heads / kv_heads``."""
    if start == end:
        return HeadShare(start, end, 0, 0, None)
    group = heads // kv_heads
    kv_start, kv_end = start // group, (end - 1) // group + 1
    index = tuple(head // group - kv_start for head in range(start, end))
    counts = {index.count(kv) for kv in range(kv_end - kv_start)}
    return HeadShare(start, end, kv_start, kv_end, None if len(counts) == 1 else index)


def head_shares(heads: int, kv_heads: int, ranks: int, chunks: int = 1) -> list[list[HeadShare]]:
    """Return, for each chunk, the share of each rank.

    A rank attends neighbouring heads, `chunks` times some of them. No head is attended twice, and none is made up: of
    12 heads on 8 ranks, four ranks have two and four have one.
    """
    by_rank = []
    for start, end in spans(shares(heads, ranks)):
        parts = [(start + a, start + b) for a, b in spans(shares(end - start, chunks))]
        by_rank.append([head_share(heads, kv_heads, a, b) for a, b in parts])
    return [[of_rank[chunk] for of_rank in by_rank] for chunk in range(chunks)]
