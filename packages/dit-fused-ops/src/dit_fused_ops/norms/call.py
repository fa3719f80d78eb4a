"""What a call of a norm is, and which calls are legal."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.arguments import require_rank, require_same_device, require_tensor, require_type, wants_grad
from dit_fused_ops.dispatch import Call, bucket
from dit_fused_ops.errors import ParametersInvalid

IMPL_MODES = (0, 1, 2)
ACCURATE, HALF_ONLY = 0, 2


@dataclass(frozen=True, kw_only=True)
class NormCall(Call):
    """One norm over the last dimension, with what surrounds it in a block of a diffusion transformer.

    Attributes:
        kind: "layer" or "rms".
        eps: added to the variance.
        x_shape: of x, of the update and of the result.
        affine: which of "weight" and "bias" there are, in words.
        modulation: "sample" for scale and shift of one vector a sample, "token" for one a token, "" for none.
        residual: how an update is added to x before: "plain", by a gate of one vector a "sample" or "token", "" if not.
        impl_mode: of `fast_layernorm`.
        dtypes: of weight, bias, scale, shift, update and gate, where there are.
    """

    kind: str
    eps: float
    x_shape: tuple[int, ...]
    affine: str
    modulation: str
    residual: str
    impl_mode: int
    dtypes: tuple[torch.dtype | None, ...]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 x, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def shape_BSH(self) -> tuple[int, int, int]:
        """Samples, tokens and channels; all rows are one sample where nothing tells samples apart."""
        *rows, hidden = self.x_shape
        return (rows[0], rows[1], hidden) if self.features - {self.kind} else (1, prod(rows), hidden)

    @property
    def features(self) -> frozenset[str]:
        """The kind of norm, "modulation" and "residual"."""
        asked = {self.kind: True, "modulation": self.modulation != "", "residual": self.residual != ""}
        return frozenset(name for name, wanted in asked.items() if wanted)

    @property
    def shape_key(self) -> str:
        """Kind, sizes, what surrounds the norm, and the other dtypes."""
        batch, tokens, hidden = self.shape_BSH
        parts = [f"{self.kind} {bucket(batch)} {bucket(tokens)} h{hidden}", self.affine]
        parts.append(self.modulation and f"modulated by {self.modulation}")
        parts.append(self.residual and f"residual {self.residual}")
        parts.extend(sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes if dtype is not None}))
        return " ".join(part for part in parts if part)


def describe(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> NormCall:
    """Check x, weight, bias, scale, shift, y and gate, and describe the call; raises `ParametersInvalid`.

    The options are kind, eps, impl_mode, whether scale and shift must have the batch size of x, fused, and the sizes
    that the norm is over, or None.
    """
    x, weight, bias, scale, shift, y, gate = tensors
    kind, eps, impl_mode, legacy, fused, over = options
    require_type(fused, "fused", bool)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise ParametersInvalid(f"eps must be a number, given {eps!r}")
    x = require_tensor(x, "x")
    given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "y": y, "gate": gate}
    others = {name: require_tensor(tensor, name) for name, tensor in given.items() if tensor is not None}
    require_same_device(x, "x", **others)
    if over is not None and over != tuple(x.shape[-1:]):
        raise ParametersInvalid(
            f"norm is over {list(over)}, and the last dimension of x {list(x.shape)} must be just that"
        )
    _check_affine(x, weight, bias)
    if (scale is None) != (shift is None):
        raise ParametersInvalid("scale and shift go together: pass both, or neither")
    if scale is not None or y is not None:
        require_rank(x, "x", 3)
    if y is not None and y.shape != x.shape:
        raise ParametersInvalid(f"x and y must have one shape, given {list(x.shape)} and {list(y.shape)}")
    if y is None and gate is not None:
        raise ParametersInvalid("a gate needs the update y that it opens to")
    _check_impl_mode(impl_mode, x, *others.values())
    modulation = {_along(x, others[name], name, legacy) for name in ("scale", "shift") if name in others}
    return NormCall(
        device=x.device,
        dtype=x.dtype,
        needs_grad=wants_grad(x, *others.values()),
        kind=kind,
        eps=eps,
        x_shape=tuple(x.shape),
        affine=" ".join(name for name in ("weight", "bias") if name in others),
        modulation="token" if "token" in modulation else "sample" if modulation else "",
        residual="" if y is None else "plain" if gate is None else _along(x, gate, "gate", legacy),
        impl_mode=impl_mode,
        dtypes=tuple(None if tensor is None else tensor.dtype for tensor in given.values()),
    )


def _check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    for tensor, name in ((weight, "weight"), (bias, "bias")):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ParametersInvalid(
                f"{name} is {list(tensor.shape)}, and the last dimension of x {list(x.shape)} wants [{x.shape[-1]}]"
            )


def _check_impl_mode(mode: Any, *tensors: Tensor) -> None:
    if isinstance(mode, bool) or mode not in IMPL_MODES:
        raise ParametersInvalid(f"Expected impl_mode to be in {list(IMPL_MODES)}, given {mode!r}")
    if mode == HALF_ONLY and any(tensor.dtype != torch.float16 for tensor in tensors):
        names = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise ParametersInvalid(f"impl_mode 2 only support all input dtype float16! Given {names}; use impl_mode 0")


def _along(x: Tensor, tensor: Tensor, name: str, legacy: bool) -> str:
    """Whether the tensor has one vector a "sample", [B, H] or [B, 1, H], or one a "token", [B, S, H]; B may be 1."""
    require_rank(tensor, name, 2, 3)
    batch, tokens, hidden = x.shape
    per_token = tensor.dim() == 3 and tensor.shape[1] != 1
    fits = tensor.shape[-1] == hidden and (not per_token or tensor.shape[1] == tokens)
    if not fits or (tensor.shape[0] != batch and (legacy or tensor.shape[0] != 1)):
        forms = f"[{batch}, {hidden}], [{batch}, 1, {hidden}] or [{batch}, {tokens}, {hidden}]"
        raise ParametersInvalid(
            f"{name} is {list(tensor.shape)}; x {list(x.shape)} wants {forms}"
            + ("" if legacy else ", where the first size may be 1")
        )
    return "token" if per_token else "sample"
