"""What a multiply-add is, and which calls are legal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.arguments import require_same_device, require_tensor, wants_grad
from dit_fused_ops.dispatch import Call, bucket
from dit_fused_ops.errors import ParametersInvalid


@dataclass(frozen=True, kw_only=True)
class MultiplyAddCall(Call):
    """One ``base + update · factor``, or ``base + update · (1 + factor)``.

    Attributes:
        plus_one: which of the two.
        shape: of the update and of the result.
        factor_shape: what broadcasts to it.
        dtypes: of base, update and factor.
    """

    plus_one: bool
    shape: tuple[int, ...]
    factor_shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 where a tensor has it, else float32."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    @property
    def shape_key(self) -> str:
        """The formula, the sizes, how the factor broadcasts and the dtypes."""
        lengths = "x".join(str(bucket(size)) for size in self.shape)
        factor = "x".join("1" if size == 1 else "n" for size in self.factor_shape)
        names = " ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{lengths} factor {factor}{' plus one' if self.plus_one else ''} of {names}"


def describe(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> MultiplyAddCall:
    """Check base, update and factor and describe the call; raises `ParametersInvalid`."""
    (plus_one,) = options
    names = ("shift", "x", "scale") if plus_one else ("x", "y", "gate")
    base, update, factor = (require_tensor(t, name) for t, name in zip(tensors, names, strict=True))
    require_same_device(base, names[0], **{names[1]: update, names[2]: factor})
    if not plus_one and base.shape != update.shape:
        raise ParametersInvalid(f"x and y must have one shape, given {list(base.shape)} and {list(update.shape)}")
    for tensor, name in ((base, names[0]), (factor, names[2])):
        if not _broadcasts(tensor, update):
            raise ParametersInvalid(
                f"{name} {list(tensor.shape)} does not broadcast to {names[1]} {list(update.shape)}; "
                "one vector a sample is [B, 1, H]"
            )
    return MultiplyAddCall(
        device=update.device,
        dtype=(update if plus_one else base).dtype,
        needs_grad=wants_grad(base, update, factor),
        plus_one=plus_one,
        shape=tuple(update.shape),
        factor_shape=tuple(factor.shape),
        dtypes=(base.dtype, update.dtype, factor.dtype),
    )


def _broadcasts(tensor: Tensor, target: Tensor) -> bool:
    """Whether the tensor can be expanded to the shape of `target`."""
    sizes = zip(reversed(tensor.shape), reversed(target.shape), strict=False)
    return tensor.dim() <= target.dim() and all(size in (1, wanted) for size, wanted in sizes)
