"""Rotary position embedding: one public function, its reference, its backends."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from dit_fused_ops.dispatch import Op, Probe, dispatcher, spread_rows
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.rope.backends import BACKENDS, wide_table
from dit_fused_ops.rope.call import RopeCall, describe
from dit_fused_ops.rope.reference import full_width, rotary_naive

__all__ = ["rotary_position_embedding", "rope_tables_from_complex", "rotary_naive", "full_width", "ROPE"]

_PROBED_TOKENS = 64  # compared with the reference before a backend may win


@overload
def rotary_position_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotated_mode: str = ...,
    head_first: bool = ...,
    fused: bool = ...,
    *,
    key: None = ...,
    layout: str | None = ...,
    rotary_dim: int | None = ...,
    opt_mode: str | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def rotary_position_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotated_mode: str = ...,
    head_first: bool = ...,
    fused: bool = ...,
    *,
    key: Tensor,
    layout: str | None = ...,
    rotary_dim: int | None = ...,
    opt_mode: str | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def rotary_position_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotated_mode: str = "rotated_half",
    head_first: bool = False,
    fused: bool = True,
    *,
    key: Tensor | None = None,
    layout: str | None = None,
    rotary_dim: int | None = None,
    opt_mode: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``x · cos + rotate(x) · sin``, where ``rotate`` turns a pair (a, b) of channels into (-b, a).

    The pairs are (i, i + D/2) in "rotated_half" and (2i, 2i + 1) in "rotated_interleaved" (RoFormer, arXiv
    2104.09864). Computed in float32 or wider; dtype, shape and layout of the result are those of `x`.

    Args:
        x: queries or keys, [B, S, N, D], or [B, N, S, D] with `head_first`.
        cos: [S, D], or four dimensions that broadcast to `x`: the cosine at both channels of a pair, laid out for
            `rotated_mode`. Half as wide, [S, D/2] or [..., D/2], it has one column for each pair and fits both modes.
        sin: the sine in the same form.
        rotated_mode: which channels are a pair.
        head_first: whether the heads of `x` stand before its tokens.
        fused: False computes the naive reference.
        key: rotated in the same way; its number of heads may differ from that of `x`.
        layout: "BSND", "BNSD" or "SBND", instead of `head_first`.
        rotary_dim: channels that turn, the first ones of a head; all without it.
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Returns:
        The rotated `x`, or with `key` the pair of both.

    Raises:
        ParametersInvalid: a type, rank or size does not fit, the mode is unknown, or full-width tables are laid out
            for the other mode.
        BackendRefused: `backend` cannot carry out this call.
    """
    options = (rotated_mode, head_first, fused, layout, rotary_dim)
    named = backend if fused else "naive"
    rotated: Tensor = dispatcher(ROPE, (x, cos, sin), options, mode=opt_mode, named=named)
    if key is None:
        return rotated
    return rotated, dispatcher(ROPE, (key, cos, sin), options, mode=opt_mode, named=named)


def rope_tables_from_complex(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine tables, one column a pair, for complex frequencies ``cos + i sin`` [..., D/2].

    Raises:
        ParametersInvalid: `turns` is not complex.
    """
    if not isinstance(turns, Tensor) or not turns.is_complex():
        raise ParametersInvalid(f"complex frequencies are expected, given {getattr(turns, 'dtype', type(turns))}")
    return turns.real, turns.imag


def _probe(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Probe:
    axis = call.layout.index("S")
    rows = spread_rows(x.shape[axis], _PROBED_TOKENS, x.device)
    cos, sin = (wide_table(call, table) for table in (cos, sin))
    if call.table_shape[axis] != 1:
        cos, sin = (table.index_select(axis, rows) for table in (cos, sin))
    wanted = rotary_naive(x.index_select(axis, rows), cos, sin, call.mode)
    return Probe(select=lambda output: output.index_select(axis, rows), wanted=wanted)


ROPE: Op[RopeCall] = Op(name="rotary_position_embedding", describe=describe, backends=BACKENDS, probe=_probe)
