"""A conversion rule is data: which Hugging Face tensors make which Megatron tensor, and how it is cut.

Every operation of these layouts is a rearrangement: each rank's tensor is a concatenation of slices
of the source tensors, along one dimension. So an operation only has to name those slices, and a rule
read backwards is the same slices with the arrow turned round (see :mod:`mm_convert.plans`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mm_convert.errors import LayoutError
from mm_convert.layout import Part

Shape = tuple[int, ...]
Where = Literal["layer", "first", "last", "start", "end"] | int
ZERO = ""
"""In place of a Hugging Face name: zeros of the first source's shape, left out again on the way back."""
PADDING = -1
"""In place of a source's number: zeros that no source has, left out again on the way back."""


@dataclass(frozen=True)
class Piece:
    """``source[start:stop]`` along the operation's dimension; `source` counts the rule's tensors, or is `PADDING`."""

    source: int
    start: int
    stop: int


class Operation(Protocol):
    """How the sources of a rule become the tensor of each tensor-parallel rank."""

    @property
    def dim(self) -> int:
        """The dimension along which pieces are cut and concatenated."""

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """The pieces of each rank, in order.

        Raises:
            LayoutError: the tensors can't be cut into `tp_size` equal parts.
        """


@dataclass(frozen=True)
class Copy:
    """The same tensor on every rank (norms, biases of row-parallel layers, the patch embedding)."""

    dim: int = 0

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """One whole piece on every rank."""
        return [[Piece(0, 0, shapes[0][0])] for _ in range(tp_size)]


@dataclass(frozen=True)
class Split:
    """Equal slices along `dim`: 0 for column-parallel layers and the vocabulary, 1 for row-parallel."""

    dim: int

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """Slice t of `tp_size` on rank t."""
        size = _share(shapes[0][self.dim], tp_size, f"dimension {self.dim} of size")
        return [[Piece(0, t * size, (t + 1) * size)] for t in range(tp_size)]


@dataclass(frozen=True)
class Vocabulary:
    """A row for each token, in equal slices: padded with zeros, if asked for, until there are.

    Args:
        multiple: what a rank's rows are rounded up to a multiple of; 0 for no padding.
    """

    multiple: int = 0
    dim: int = 0

    def share(self, size: int, tp_size: int) -> int:
        """Rows of each rank."""
        return -(-size // (self.multiple * tp_size)) * self.multiple

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """Slice t of `tp_size` on rank t, the last ones with zeros behind them or of zeros alone.

        Raises:
            LayoutError: tp_size does not divide a vocabulary that is not to be padded.
        """
        size = shapes[0][0]
        if not self.multiple and size % tp_size:
            legal = [n for n in range(1, size + 1) if size % n == 0 and n <= 64]
            raise LayoutError(
                f"tp_size {tp_size} does not divide the vocabulary of {size} tokens; legal without padding: {legal}; or"
                " have rows of zeros put behind it, as Megatron does: make_vocab_size_divisible_by 128 (its default)"
            )
        share = self.share(size, tp_size) if self.multiple else size // tp_size
        return [list(self._slice(size, t * share, (t + 1) * share)) for t in range(tp_size)]

    def _slice(self, size: int, start: int, stop: int) -> Iterator[Piece]:
        if start < size:
            yield Piece(0, start, min(stop, size))
        if stop > size:
            yield Piece(PADDING, max(start, size), stop)


@dataclass(frozen=True)
class Gated:
    """Gate over up projection. Rank t holds ``[gate_t; up_t]``, which is no plain cut of the whole."""

    dim: int = 0

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """The rank's rows of the gate, then those of the up projection."""
        size = _share(shapes[0][0], tp_size, "intermediate size")
        return [[Piece(s, t * size, (t + 1) * size) for s in (0, 1)] for t in range(tp_size)]


@dataclass(frozen=True)
class GroupedQKV:
    """Q, K and V interleaved by key/value group: ``q0…q(r-1) k0 v0  qr…  k1 v1 …``."""

    groups: int
    dim: int = 0

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """For each group of the rank: its query heads, its key head, its value head."""
        share = _share(self.groups, tp_size, "num_key_value_heads")
        sizes = [shape[0] // self.groups for shape in shapes]
        return [
            [
                Piece(s, group * size, (group + 1) * size)
                for group in range(t * share, (t + 1) * share)
                for s, size in enumerate(sizes)
            ]
            for t in range(tp_size)
        ]


@dataclass(frozen=True)
class StackedQKV:
    """One tensor ``[Q; K; V]`` that becomes interleaved by head: ``q0 k0 v0 q1 k1 v1 …``."""

    heads: int
    dim: int = 0

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """For each head of the rank: its rows in Q, in K and in V."""
        share = _share(self.heads, tp_size, "number of vision heads")
        third = shapes[0][0] // 3
        size = third // self.heads
        return [
            [
                Piece(0, part * third + head * size, part * third + (head + 1) * size)
                for head in range(t * share, (t + 1) * share)
                for part in range(3)
            ]
            for t in range(tp_size)
        ]


@dataclass(frozen=True)
class Stacked:
    """One tensor of equal parts one over another (``[gate; up]``, ``[Q; K; V]``); rank t holds its slice of each."""

    parts: int
    dim: int = 0

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """The rank's rows of every part, in order."""
        part = _share(shapes[0][self.dim], self.parts, "stacked size", given="the number of parts")
        size = _share(part, tp_size, "size of a stacked part")
        return [
            [Piece(0, n * part + t * size, n * part + (t + 1) * size) for n in range(self.parts)]
            for t in range(tp_size)
        ]


@dataclass(frozen=True)
class Transposed:
    """An operation on matrices that Hugging Face stores the other way round: ``[in, out]``.

    Args:
        operation: what is done once they are turned; its `dim` is that of the Megatron tensor.
        inputs: input features, where a matrix may be stored either way: one with as many rows is turned. 0: all are.
    """

    operation: Operation
    inputs: int = 0

    def turns(self, shape: Shape) -> bool:
        """Whether a matrix of this shape has to be turned."""
        return not self.inputs or shape[0] == self.inputs

    @property
    def dim(self) -> int:
        """The dimension of the Megatron tensor along which pieces are cut and concatenated."""
        return self.operation.dim

    def pieces(self, shapes: Sequence[Shape], tp_size: int) -> list[list[Piece]]:
        """The pieces of each rank, along the other dimension of the sources if these are turned."""
        turned = [shape[::-1] if self.turns(shape) else shape for shape in shapes]
        return self.operation.pieces(turned, tp_size)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Tensors `hf` make the tensor `mm`.

    Args:
        hf: names with ``{i}`` for the global layer number, and ``{x}`` for the global number of an expert; or `ZERO`.
        mm: name with ``{j}`` for the layer number inside its stage, and ``{y}`` for the expert's number inside its
            expert-parallel rank.
        operation: how it is put together and cut over tensor-parallel ranks.
        part: the layer lists that place it.
        where: in every stage's layers; on the first or last stage that holds a layer of the part; at the
            start or end of the pipeline, whatever stands there; or beside the global layer of this number.
        optional: the rule applies only where the sources exist.
    """

    hf: tuple[str, ...]
    mm: str
    operation: Operation
    part: Part
    where: Where = "layer"
    optional: bool = False


def _share(size: int, count: int, what: str, *, given: str = "tp_size") -> int:
    if size % count:
        legal = [n for n in range(1, size + 1) if size % n == 0 and n <= 64]
        raise LayoutError(f"{given} {count} does not divide the {what} {size}; legal here: {legal}")
    return size // count


def is_turned(operation: Operation, shape: Shape) -> bool:
    """Whether an operation takes the columns of a source of this shape for its rows."""
    return isinstance(operation, Transposed) and operation.turns(shape)
