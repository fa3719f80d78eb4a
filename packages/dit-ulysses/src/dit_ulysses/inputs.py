"""Queries, keys, values and masks as callers give them: their layouts, and whether they fit each other.

Shape suffixes: B batch, S tokens of queries and T of keys, N query heads, D channels of a head.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dit_ulysses.errors import ShapeError

Layout = Literal["BSND", "BNSD"]
Joint = tuple[Tensor, Tensor, Tensor]  # queries, keys and values of tokens that every rank holds
Order = tuple[int, int, int, int]

TO_SBND: dict[str, Order] = {"BSND": (1, 0, 2, 3), "BNSD": (2, 0, 1, 3)}  # for `permute`
FROM_SBND: dict[str, Order] = {"BSND": (1, 0, 2, 3), "BNSD": (1, 2, 0, 3)}


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    """Raise ShapeError unless these are queries, keys and values in this layout."""
    if layout not in TO_SBND:
        raise ShapeError(f"layout is {layout!r}; there are {', '.join(TO_SBND)}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4 or tensor.dtype != q.dtype:
            raise ShapeError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; {q.dtype} {layout} of 4 dimensions is expected"
            )
    if k.shape != v.shape:
        raise ShapeError(f"k is {list(k.shape)} and v is {list(v.shape)}; the same shape is expected")
    at_heads = layout.index("N")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"q is {list(q.shape)} and k is {list(k.shape)} in {layout}; batch and channels have to fit")
    if not k.shape[at_heads] or q.shape[at_heads] % k.shape[at_heads]:
        raise ShapeError(
            f"there are {q.shape[at_heads]} query heads and {k.shape[at_heads]} of keys and values; the latter have to "
            "divide the former"
        )


def check_mask(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> None:
    """Raise ShapeError unless a mask is broadcastable to whole sequences."""
    wanted = (batch, heads, queries, keys)
    if mask.ndim != 4 or any(size not in (1, full) for size, full in zip(mask.shape, wanted, strict=True)):
        raise ShapeError(
            f"mask is {list(mask.shape)}; 4 dimensions that broadcast to [B, N, S, T] = {list(wanted)} are expected: "
            "all tokens of all ranks"
        )


def check_joint(joint: Joint, q: Tensor, k: Tensor, layout: Layout) -> tuple[int, int]:
    """Return the numbers of joint queries and keys.

    Raises:
        ShapeError: they do not fit each other, or not the other queries and keys.
    """
    check_attention_inputs(*joint, layout)
    at_heads, tokens = layout.index("N"), layout.index("S")
    for name, tensor, like in (("queries", joint[0], q), ("keys", joint[1], k)):
        if (tensor.shape[0], tensor.shape[at_heads], tensor.shape[3]) != (
            like.shape[0],
            like.shape[at_heads],
            like.shape[3],
        ):
            raise ShapeError(
                f"joint {name} are {list(tensor.shape)} beside {list(like.shape)} in {layout}; only the number of "
                "tokens may differ"
            )
    return joint[0].shape[tokens], joint[1].shape[tokens]
