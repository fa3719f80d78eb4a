"""What a call of rotary_position_embedding is, and which calls are legal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.arguments import (
    require_rank,
    require_same_device,
    require_tensor,
    require_type,
    resolve_layout,
    wants_grad,
)
from dit_fused_ops.dispatch import Call, bucket, readable
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.rope.reference import MODES


@dataclass(frozen=True, kw_only=True)
class RopeCall(Call):
    """One rotation.

    Attributes:
        mode: which channels are a pair.
        layout: of x.
        x_shape: its four sizes.
        table_shape: the tables as four dimensions that broadcast to x but for the last.
        rotary_dim: channels that turn, the first ones.
        table_dtype: of both tables.
        table_grad: whether a gradient of the tables may be asked for.
    """

    mode: str
    layout: str
    x_shape: tuple[int, int, int, int]
    table_shape: tuple[int, ...]
    rotary_dim: int
    table_dtype: torch.dtype
    table_grad: bool

    @property
    def half_width(self) -> bool:
        """Whether the tables have one column for each pair, not for each channel."""
        return self.table_shape[3] * 2 == self.rotary_dim

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 where x or the tables have it, else float32."""
        return torch.float64 if torch.float64 in (self.dtype, self.table_dtype) else torch.float32

    @property
    def features(self) -> frozenset[str]:
        """ "partial" rotation of some channels, "gradient of the tables"."""
        asked = {"partial": self.rotary_dim != self.x_shape[3], "gradient of the tables": self.table_grad}
        return frozenset(name for name, wanted in asked.items() if wanted)

    @property
    def shape_key(self) -> str:
        """Layout, sizes, mode and kind of the tables."""
        b, *middle, d = self.x_shape
        lengths = " ".join(str(bucket(size)) for size in (b, *middle))
        table = f"{'half' if self.half_width else 'full'} {str(self.table_dtype).removeprefix('torch.')}"
        return f"{self.layout} {lengths} d{d} r{self.rotary_dim} {self.mode} tables {table}"


def describe(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> RopeCall:
    """Check the arguments of rotary_position_embedding and describe the call; raises `ParametersInvalid`."""
    x, cos, sin = (require_tensor(t, name) for t, name in zip(tensors, ("x", "cos", "sin"), strict=True))
    mode, head_first, fused, layout, rotary_dim = options
    for value, name, kind in ((mode, "rotated_mode", str), (head_first, "head_first", bool), (fused, "fused", bool)):
        require_type(value, name, kind)
    if mode not in MODES:
        raise ParametersInvalid(f"Unsupported rotated_mode {mode!r}, legal are {', '.join(MODES)}")
    require_rank(x, "x", 4)
    require_rank(cos, "cos", 2, 4)
    require_rank(sin, "sin", 2, 4)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ParametersInvalid(
            f"cos and sin must be alike, given {list(cos.shape)} {cos.dtype} and {list(sin.shape)} {sin.dtype}"
        )
    require_same_device(x, "x", cos=cos, sin=sin)
    layout = resolve_layout(layout, head_first)
    call = RopeCall(
        device=x.device,
        dtype=x.dtype,
        needs_grad=wants_grad(x, cos, sin),
        mode=mode,
        layout=layout,
        x_shape=(x.shape[0], x.shape[1], x.shape[2], x.shape[3]),
        table_shape=_table_shape(x, cos, layout),
        rotary_dim=_rotary_dim(x.shape[-1], cos.shape[-1], rotary_dim),
        table_dtype=cos.dtype,
        table_grad=wants_grad(cos, sin),
    )
    if readable(x, cos, sin):
        _check_table_layout(call, cos, sin)
    return call


def _table_shape(x: Tensor, table: Tensor, layout: str) -> tuple[int, ...]:
    """The four sizes of a table: a 2-D one stands along the tokens of x."""
    tokens = layout.index("S")
    if table.dim() == 2:
        if table.shape[0] != x.shape[tokens]:
            raise ParametersInvalid(
                f"cos and sin have {table.shape[0]} rows, x has {x.shape[tokens]} tokens ({layout} {list(x.shape)})"
            )
        return (*(table.shape[0] if axis == tokens else 1 for axis in range(3)), table.shape[1])
    sizes = zip(table.shape[:3], x.shape[:3], strict=True)
    if any(size not in (1, wanted) for size, wanted in sizes):
        raise ParametersInvalid(f"cos and sin {list(table.shape)} do not broadcast to x {list(x.shape)}")
    return tuple(table.shape)


def _rotary_dim(head_dim: int, width: int, given: int | None) -> int:
    """The number of channels that turn; it must be even and fit the width of the tables, full or half."""
    turning = head_dim if given is None else given
    if isinstance(turning, bool) or not isinstance(turning, int) or not 0 < turning <= head_dim or turning % 2:
        raise ParametersInvalid(f"rotary_dim is {turning!r}, legal are even numbers up to the head dim {head_dim}")
    if width not in (turning, turning // 2):
        raise ParametersInvalid(
            f"cos and sin are {width} wide; {turning} (one column a channel) or {turning // 2} (one a pair) would fit "
            f"the {turning} channels that turn"
            + (
                ""
                if given is not None
                else f"; to turn only {width} of the {head_dim} channels, say rotary_dim={width}"
            )
        )
    return turning


def _check_table_layout(call: RopeCall, cos: Tensor, sin: Tensor) -> None:
    """Raise when full-width tables are laid out for the other mode; reads numbers, so only at the first call of a kind.

    Tables of one mode in the other give no rotation at all, and nothing else would say so.
    """
    if call.half_width or call.rotary_dim <= 2 or call.table_grad:
        return
    other = next(mode for mode in MODES if mode != call.mode)
    fits = {mode: all(_laid_out(table.detach(), mode) for table in (cos, sin)) for mode in MODES}
    if fits[other] and not fits[call.mode]:
        raise ParametersInvalid(
            f"cos and sin are laid out for {other!r}, and rotated_mode is {call.mode!r}: pass the mode of the tables, "
            "or tables with one column a pair, which fit both"
        )


def _laid_out(table: Tensor, mode: str) -> bool:
    if mode == "rotated_half":
        first, second = table.chunk(2, dim=-1)
    else:
        first, second = table[..., 0::2], table[..., 1::2]
    return bool(torch.equal(first, second))
