"""What a call of block-sparse attention is: queries, keys and values in tile order, and the blocks that take part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_fused_ops.arguments import wants_grad
from dit_fused_ops.dispatch import Call, bucket
from dit_fused_ops.errors import ParametersInvalid


@dataclass(frozen=True, kw_only=True)
class SparseCall(Call):
    """One block-sparse attention over [B, N, S, D].

    Attributes:
        q_shape: the four sizes of the queries.
        k_shape: the four sizes of the keys and of the values.
        block_size: tokens of a block.
        scale: of the scores.
        inner_precise: 0 for the vendor's precise softmax, 1 for its fast one; the others are always precise.
        density: the share of pairs of blocks that is kept at least, in tenths; decides what is fast, never the result.
    """

    q_shape: tuple[int, int, int, int]
    k_shape: tuple[int, int, int, int]
    block_size: int
    scale: float
    inner_precise: int
    density: float

    @property
    def block_counts(self) -> tuple[int, int]:
        """Blocks of queries and blocks of keys."""
        return -(-self.q_shape[2] // self.block_size), -(-self.k_shape[2] // self.block_size)

    @property
    def shape_key(self) -> str:
        """Sizes, block size and density."""
        batch, heads, tokens, channels = self.q_shape
        sizes = f"b{batch} n{heads}/{self.k_shape[1]} s{bucket(tokens)}/{bucket(self.k_shape[2])} d{channels}"
        return f"{sizes} block{self.block_size} density{self.density:.1f} precise{self.inner_precise}"


def describe(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> SparseCall:
    """Describe a call whose arguments `sparse_attention` has checked; raises `ParametersInvalid` for mixed dtypes."""
    q, k, v, mask = (tensor for tensor in tensors if tensor is not None)
    scale, block_size, inner_precise, density = options
    if not q.dtype == k.dtype == v.dtype:
        raise ParametersInvalid(f"q, k and v must be of one dtype, given {q.dtype}, {k.dtype} and {v.dtype}")
    call = SparseCall(
        device=q.device,
        dtype=q.dtype,
        needs_grad=wants_grad(q, k, v),
        q_shape=(q.shape[0], q.shape[1], q.shape[2], q.shape[3]),
        k_shape=(k.shape[0], k.shape[1], k.shape[2], k.shape[3]),
        block_size=block_size,
        scale=scale,
        inner_precise=inner_precise,
        density=density,
    )
    assert tuple(mask.shape) == (*call.q_shape[:2], *call.block_counts), f"a mask of the blocks, not {mask.shape}"
    return call
