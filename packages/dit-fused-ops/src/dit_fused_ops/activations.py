"""Activation modules by name, each call a new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from dit_fused_ops.arguments import require_type
from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.pointwise.activation import ACTIVATION, APPROXIMATIONS, gelu_naive

__all__ = ["get_activation_layer", "GELU", "gelu_naive"]


class GELU(nn.Module):
    """`gelu_naive` by the best kernel at hand, in the dtype of the input, of any shape.

    Args:
        approximate: "none", "tanh" or "fast".

    Raises:
        ParametersInvalid: there is no such approximation.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in APPROXIMATIONS:
            raise ParametersInvalid(f"approximate is {approximate!r}, legal are {', '.join(APPROXIMATIONS)}")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every number of `x`."""
        result: Tensor = dispatcher(ACTIVATION, (x,), (self.approximate,))
        return result

    def extra_repr(self) -> str:
        """The approximation."""
        return f"approximate={self.approximate!r}"


def get_activation_layer(act_type: str) -> nn.Module:
    """Return a new activation module: "swish" or "silu", "mish", "relu", "gelu", "gelu-tanh" or "gelu-fast".

    Raises:
        ParametersInvalid: there is no such activation.
    """
    require_type(act_type, "act_type", str)
    layers: Mapping[str, Callable[[], nn.Module]] = {
        "swish": nn.SiLU,
        "silu": nn.SiLU,
        "mish": nn.Mish,
        "gelu": GELU,
        "relu": nn.ReLU,
        "gelu-tanh": lambda: GELU("tanh"),
        "gelu-fast": lambda: GELU("fast"),
    }
    if act_type.lower() not in layers:
        raise ParametersInvalid(f"Unsupported activation function {act_type!r}, legal are {', '.join(layers)}")
    return layers[act_type.lower()]()
