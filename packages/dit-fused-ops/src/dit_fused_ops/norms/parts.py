"""The tensors of a norm, and what surrounds it, written once for all plain norms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_fused_ops.norms.call import NormCall
from dit_fused_ops.pointwise.backends import rounds_once

Run = Callable[..., Any]
Plain = Callable[[NormCall, Tensor, Tensor | None, Tensor | None], Tensor]


class Parts(NamedTuple):
    """The tensors of a call in the order of the op."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    y: Tensor | None
    gate: Tensor | None


def per_token(tensor: Tensor | None) -> Tensor | None:
    """Make [B, H] into [B, 1, H]; everything else stays."""
    return tensor.unsqueeze(1) if tensor is not None and tensor.dim() == 2 else tensor


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors in `dtype`."""
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def modulation(parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and shift, which must be there, as [B, 1, H] or [B, S, H] in `dtype`."""
    scale, shift = cast(dtype, per_token(parts.scale), per_token(parts.shift))
    assert scale is not None, "the description of the call says that there is a modulation"
    assert shift is not None, "the description of the call says that there is a modulation"
    return scale, shift


def gated_sum(x: Tensor, y: Tensor, gate: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return ``x + y · gate``, or ``x + y``."""
    return torch.add(x, y, out=out) if gate is None else torch.addcmul(x, y, gate, out=out)


def normed_input(call: NormCall, parts: Parts) -> Tensor:
    """Return what is normed: x, or with an update the new residual, in the dtype of x."""
    if parts.y is None:
        return parts.x
    gate = per_token(parts.gate)
    if rounds_once(call, parts.x, parts.y, gate):
        return gated_sum(parts.x, parts.y, gate)
    dtype = call.compute_dtype
    return gated_sum(parts.x.to(dtype), parts.y.to(dtype), cast(dtype, gate)[0]).to(call.dtype)


def with_surroundings(plain: Plain) -> Run:
    """Put the residual before a plain norm, and the modulation after it, in the dtype that the norm returns."""

    @functools.wraps(plain)
    def run(call: NormCall, *tensors: Any) -> Any:
        parts = Parts(*tensors)
        x = normed_input(call, parts)
        normed = plain(call, x, parts.weight, parts.bias)
        if call.modulation:
            scale, shift = modulation(parts, normed.dtype)
            normed = torch.addcmul(shift, normed, 1 + scale)
        normed = normed.to(call.dtype)
        return normed if parts.y is None else (x, normed)

    return run
