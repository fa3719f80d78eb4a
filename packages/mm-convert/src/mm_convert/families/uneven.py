"""Cuts that need not come out even, as InternVL has them: the 25 heads of InternViT-6B, a vocabulary of any size.

Whole units (heads, rows) are dealt out in order; where tensor-parallel ranks don't divide their number, the first ranks
hold one more than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mm_convert.errors import LayoutError
from mm_convert.rules import Piece, Shape


@dataclass(frozen=True)
class UnevenSplit:
    """Slices along `dim` of nearly equal size.

    Args:
        dim: the dimension.
        heads: what must stay whole, an equal part of the dimension each; 0: every row or column by itself.
    """

    dim: int
    heads: int = 0

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """Slice t on rank t.

        Raises:
            LayoutError: more ranks than there is to deal out, or heads that are no equal parts.
        """
        size = shapes[0][self.dim]
        return [[Piece(0, start, stop)] for start, stop in _slices(size, self.heads or size, tp_size)]


@dataclass(frozen=True)
class UnevenQKV:
    """Query, key and value, as one tensor ``[Q; K; V]`` or as three; rank t holds ``[q_t; k_t; v_t]``, whole heads.

    Args:
        heads: heads of the query, and of key and value as many.
    """

    heads: int
    dim: int = 0

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """The rank's rows in Q, in K and in V.

        Raises:
            LayoutError: more ranks than heads, or heads that are no equal parts.
        """
        width = shapes[0][0] if len(shapes) == 3 else shapes[0][0] // 3
        starts = [(part, 0) if len(shapes) == 3 else (0, part * width) for part in range(3)]
        return [
            [Piece(source, first + start, first + stop) for source, first in starts]
            for start, stop in _slices(width, self.heads, tp_size)
        ]


def _slices(size: int, units: int, tp_size: int) -> list[tuple[int, int]]:
    if tp_size > units:
        raise LayoutError(f"tp_size {tp_size} is more than there are heads or rows to deal out, {units}")
    if size % units:
        raise LayoutError(f"a dimension of size {size} is not made of {units} heads of one size")
    share, more = divmod(units, tp_size)
    ends = [t * share + min(t, more) for t in range(tp_size + 1)]
    return [(start * size // units, stop * size // units) for start, stop in pairwise(ends)]
