"""GELU and SwiGLU as one op: the activations for which an NPU has kernels of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fused_ops.arguments import require_tensor, wants_grad
from dit_fused_ops.dispatch import FLOATS, Backend, Call, Op, Probe, Rule, bucket, dispatcher
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.platform import op_missing
from dit_fused_ops.pointwise.reference import swiglu_naive, wide

APPROXIMATIONS = ("none", "tanh", "fast")
_FAST_SLOPE = 1.702
_PROBED = 1 << 14  # numbers that are compared with the reference before a backend may win


@dataclass(frozen=True, kw_only=True)
class ActivationCall(Call):
    """One activation.

    Attributes:
        kind: "swiglu", or the approximation of a GELU.
        shape: of the input.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def features(self) -> frozenset[str]:
        """The kind."""
        return frozenset({self.kind})

    @property
    def shape_key(self) -> str:
        """Kind and size."""
        count = 1
        for size in self.shape:
            count *= size
        return f"{self.kind} {bucket(count)}"


def gelu_naive(x: Tensor, approximate: str = "none") -> Tensor:
    """Return ``x · Φ(x)`` in float32 (GELU, arXiv 1606.08415), with Φ the normal distribution or an approximation.

    Φ(x) is ``(1 + erf(x / √2)) / 2`` in "none", ``(1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2`` in "tanh" and
    ``σ(1.702 x)`` in "fast", which is off by up to 0.02.
    """
    x = wide(x)
    if approximate == "fast":
        return x * torch.sigmoid(_FAST_SLOPE * x)
    if approximate == "tanh":
        return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def swiglu(x: Tensor, *, opt_mode: str | None = None, backend: str | None = None) -> Tensor:
    """Return ``hidden · silu(gate)`` of ``x = [hidden | gate]`` (SwiGLU, arXiv 2002.05202), in the dtype of `x`.

    The halves stand in the order of MindIE SD and diffusers; ``npu_swiglu`` of torch_npu has the gate first.

    Args:
        x: [..., 2 H].
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Returns:
        [..., H].

    Raises:
        ParametersInvalid: the last dimension is odd, or there is none.
        BackendRefused: `backend` cannot carry out this call.
    """
    result: Tensor = dispatcher(ACTIVATION, (x,), ("swiglu",), mode=opt_mode, named=backend)
    return result


def _describe(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> ActivationCall:
    x = require_tensor(tensors[0], "x")
    (kind,) = options
    if kind == "swiglu" and (x.dim() == 0 or x.shape[-1] % 2):
        raise ParametersInvalid(f"the last dimension of x must be two halves, hidden and gate, given {list(x.shape)}")
    return ActivationCall(device=x.device, dtype=x.dtype, needs_grad=wants_grad(x), kind=kind, shape=tuple(x.shape))


def _reference(call: ActivationCall, x: Tensor) -> Tensor:
    return swiglu_naive(x) if call.kind == "swiglu" else gelu_naive(x, call.kind)


def _naive(call: ActivationCall, x: Tensor) -> Tensor:
    return _reference(call, x).to(call.dtype)


def _eager(call: ActivationCall, x: Tensor) -> Tensor:
    if call.kind == "swiglu":
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.silu(gate)
    if call.kind == "fast":
        return x * torch.sigmoid(_FAST_SLOPE * x)
    return F.gelu(x, approximate=call.kind)


def _npu_swiglu(call: ActivationCall, x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    activated: Tensor = torch.ops.npu.npu_swiglu(torch.cat((gate, hidden), dim=-1), -1)
    return activated


def _npu_fast_gelu(call: ActivationCall, x: Tensor) -> Tensor:
    activated: Tensor = torch.ops.npu.npu_fast_gelu(x)
    return activated


def _npu_gelu(call: ActivationCall, x: Tensor) -> Tensor:
    # Torch's own gelu takes the tanh form on an NPU whatever is asked for.
    activated: Tensor = torch.ops.npu.npu_gelu(x, approximate=call.kind)
    return activated


def _probe(call: ActivationCall, x: Tensor) -> Probe:
    if call.kind == "swiglu":
        rows = max(1, _PROBED // max(1, call.shape[-1]))
        return Probe(
            select=lambda output: output.flatten(0, -2)[:rows] if output.dim() > 1 else output,
            wanted=swiglu_naive(x.flatten(0, -2)[:rows] if x.dim() > 1 else x),
        )
    return Probe(select=lambda output: output.flatten()[:_PROBED], wanted=gelu_naive(x.flatten()[:_PROBED], call.kind))


_NPU = frozenset({"npu"})
_ALL = frozenset({"swiglu", *APPROXIMATIONS})

BACKENDS: tuple[Backend[ActivationCall], ...] = (
    Backend(
        name="npu_swiglu",
        run=_npu_swiglu,
        devices=_NPU,
        dtypes=FLOATS - {torch.float64},
        honours=frozenset({"swiglu"}),
        rules=(Rule(lambda call: len(call.shape) > 1, "x must have two dimensions or more"),),
        missing=op_missing("npu", "npu_swiglu"),
        note="the halves change places before it",
    ),
    Backend(
        name="npu_fast_gelu",
        run=_npu_fast_gelu,
        devices=_NPU,
        dtypes=FLOATS - {torch.float64},
        honours=frozenset({"fast"}),
        missing=op_missing("npu", "npu_fast_gelu"),
    ),
    Backend(
        name="npu_gelu",
        run=_npu_gelu,
        devices=_NPU,
        dtypes=FLOATS - {torch.float64},
        honours=frozenset({"none", "tanh"}),
        missing=op_missing("npu", "npu_gelu"),
    ),
    Backend(name="eager", run=_eager, honours=_ALL),
    Backend(name="naive", run=_naive, honours=_ALL, note="the reference, in float32"),
)

ACTIVATION: Op[ActivationCall] = Op(name="activation", describe=_describe, backends=BACKENDS, probe=_probe)
