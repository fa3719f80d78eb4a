"""Checks that several ops share: each says what was given and what is legal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.errors import ParametersInvalid

LAYOUTS = ("BSND", "BNSD", "SBND")


def require_tensor(value: Any, name: str) -> Tensor:
    """Return `value`, which must be a tensor of floating point numbers."""
    if not isinstance(value, Tensor):
        raise ParametersInvalid(f"{name} must be a Tensor, given {type(value).__name__}")
    if not value.is_floating_point():
        raise ParametersInvalid(f"{name} must hold floating point numbers, given {value.dtype}")
    return value


def require_type(value: Any, name: str, kind: type) -> None:
    """Raise unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise ParametersInvalid(f"{name} must be a {kind.__name__}, given {value!r} of {type(value).__name__}")


def require_rank(tensor: Tensor, name: str, *ranks: int) -> None:
    """Raise unless the tensor has one of the numbers of dimensions."""
    if tensor.dim() not in ranks:
        legal = " or ".join(f"{rank}-D" for rank in ranks)
        raise ParametersInvalid(f"{name} must be {legal}, given the shape {list(tensor.shape)}")


def require_same_device(first: Tensor, first_name: str, **others: Tensor | None) -> None:
    """Raise when one of `others` is on another device than `first`."""
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ParametersInvalid(
                f"{name} is on {other.device} and {first_name} on {first.device}; move them to one device"
            )


def resolve_layout(layout: str | None, head_first: bool) -> str:
    """Return the layout in force: `layout` when given, else BNSD or BSND as `head_first` says."""
    if layout is None:
        return "BNSD" if head_first else "BSND"
    if layout not in LAYOUTS:
        raise ParametersInvalid(f"layout is {layout!r}, legal are {', '.join(LAYOUTS)}")
    return layout


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for with respect to one of the tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
