"""Spans of tensors put one after another: what video transformers need beside the operations of `rules`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from mm_convert.errors import LayoutError
from mm_convert.rules import Piece, Shape

Span = tuple[int, int, int]
"""Source, first unit, and the unit after the last."""


@dataclass(frozen=True)
class Spans:
    """Spans of the sources, joined in order, and cut over tensor-parallel ranks.

    Args:
        spans: what is joined, in units of its source.
        units: how many equal units each source has along `dim`.
        cut: rank t holds slice t of each span (fused layers), slice t of what they make together, or everything.
        dim: the dimension along which all this happens.
    """

    spans: tuple[Span, ...]
    units: int
    cut: Literal["each", "together", "not"]
    dim: int = 0

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """The rank's slices of the spans.

        Raises:
            LayoutError: a source does not have `units` equal units, or what is cut no `tp_size` equal slices.
        """
        whole = [self._whole(span, shapes) for span in self.spans]
        if self.cut == "not":
            return [whole for _ in range(tp_size)]
        if self.cut == "each":
            shares = [_share(piece.stop - piece.start, tp_size) for piece in whole]
            return [[_slice(p, t * n, (t + 1) * n) for p, n in zip(whole, shares, strict=True)] for t in range(tp_size)]
        share = _share(sum(piece.stop - piece.start for piece in whole), tp_size)
        return [list(_window(whole, t * share, (t + 1) * share)) for t in range(tp_size)]

    def _whole(self, span: Span, shapes: Sequence[Shape]) -> Piece:
        source, first, end = span
        size = shapes[source][self.dim]
        if size % self.units:
            raise LayoutError(
                f"a tensor of shape {list(shapes[source])} has no {self.units} equal parts along dimension {self.dim};"
                " is this a checkpoint of this model?"
            )
        return Piece(source, first * size // self.units, end * size // self.units)


def joined(count: int, cut: Literal["each", "together", "not"]) -> Spans:
    """Several whole sources, one after another."""
    return Spans(tuple((source, 0, 1) for source in range(count)), 1, cut)


def _share(size: int, tp_size: int) -> int:
    if size % tp_size:
        legal = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
        raise LayoutError(
            f"tp_size {tp_size} does not divide the {size} rows or columns of a layer; legal here: {legal}"
        )
    return size // tp_size


def _slice(piece: Piece, start: int, stop: int) -> Piece:
    return Piece(piece.source, piece.start + start, piece.start + stop)


def _window(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[Piece]:
    """What lies between `start` and `stop` of the pieces laid end to end."""
    lengths = [piece.stop - piece.start for piece in pieces]
    for piece, length, end in zip(pieces, lengths, accumulate(lengths), strict=True):
        first, last = max(start - end + length, 0), min(stop - end + length, length)
        if first < last:
            yield _slice(piece, first, last)
