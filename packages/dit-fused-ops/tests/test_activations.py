"""Activations against torch's own, or the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_fused_ops import activations, pointwise
from dit_fused_ops.activations import GELU, gelu_naive, get_activation_layer
from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.pointwise import ACTIVATION, swiglu, swiglu_naive

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [each.name for each in ACTIVATION.backends if each.devices is None]
# Two roundings to the dtype, of the activation and of the product; near zero, where the error of the factor dominates,
# one unit of numbers of about 1.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2.0**-7, "atol": 2.0**-9},
    torch.float16: {"rtol": 2.0**-10, "atol": 2.0**-12},
}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def fast_gelu_of_the_vendor(x: Tensor) -> Tensor:
    """x / (1 + exp(-1.702 |x|)) · exp(0.851 (x - |x|)), the form that the vendor documents."""
    return x / (1 + torch.exp(-1.702 * x.abs())) * torch.exp(0.851 * (x - x.abs()))


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "silu": F.silu,
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "relu": lambda x: x.clamp(min=0),
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu-fast": fast_gelu_of_the_vendor,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_layers(name: str, dtype: torch.dtype) -> None:
    x = random(2, 5, 33, dtype=dtype)
    got = get_activation_layer(name)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), FORMULAS[name](x.double()), **CLOSE[dtype])


def test_each_call_makes_a_new_module_and_case_is_ignored() -> None:
    assert get_activation_layer("GELU-Tanh") is not get_activation_layer("gelu-tanh")
    assert isinstance(get_activation_layer("Swish"), nn.SiLU)
    assert repr(get_activation_layer("gelu-fast")) == "GELU(approximate='fast')"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 5, 34), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    half = shape[-1] // 2
    hidden, gate = x.double()[..., :half], x.double()[..., half:]
    got = swiglu(x, backend=backend)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), hidden * gate / (1 + torch.exp(-gate)), **CLOSE[dtype])


@pytest.mark.parametrize("kind", ["swiglu", "none", "tanh", "fast"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_and_gradients(backend: str, kind: str) -> None:
    x = random(3, 8, dtype=torch.float64).requires_grad_()

    def call(x: Tensor) -> Tensor:
        result: Tensor = dispatcher(ACTIVATION, (x,), (kind,), named=backend)
        return result

    torch.testing.assert_close(call(x), swiglu_naive(x) if kind == "swiglu" else gelu_naive(x, kind))
    assert torch.autograd.gradcheck(call, x)


@pytest.mark.parametrize("kind", ["swiglu", "none", "tanh", "fast"])
def test_runtime_mode_measures(kind: str) -> None:
    x = random(3, 50, 8, dtype=torch.bfloat16)
    with torch.no_grad(), dispatcher.configured(mode="runtime"):
        got = swiglu(x) if kind == "swiglu" else GELU(kind)(x)
    wanted = swiglu_naive(x) if kind == "swiglu" else gelu_naive(x, kind)
    torch.testing.assert_close(got.float(), wanted, **CLOSE[torch.bfloat16])


def feed_forward(x: Tensor) -> Tensor:
    result: Tensor = get_activation_layer("gelu-tanh")(swiglu(x))
    return result


def test_under_torch_itself() -> None:
    x = random(2, 5, 8)
    wanted = feed_forward(x)
    torch.testing.assert_close(torch.compile(feed_forward, fullgraph=True, backend="aot_eager")(x), wanted)
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(feed_forward(leaf).sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: feed_forward(x).sum())(x), slope)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feed_forward(x), wanted)
    exported = torch.export.export(nn.Sequential(GELU("fast"), GELU()), (x,))
    torch.testing.assert_close(exported.module()(x), GELU()(GELU("fast")(x)))


# Wrong types are given on purpose.
layer_of: Any = activations.get_activation_layer
glu: Any = pointwise.swiglu


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: layer_of("gelu_new"),
            "Unsupported activation function 'gelu_new', legal are .*gelu-tanh",
        ),
        (lambda: layer_of(None), "act_type must be a str, given None"),
        (lambda: GELU("erf"), "approximate is 'erf', legal are none, tanh, fast"),
        (lambda: GELU()(torch.ones(3, dtype=torch.int32)), "floating point numbers, given torch.int32"),
        (lambda: glu(random(2, 3)), r"must be two halves, hidden and gate, given \[2, 3\]"),
        (lambda: glu(torch.tensor(1.0)), r"two halves, hidden and gate, given \[\]"),
        (lambda: glu([1.0, 2.0]), "x must be a Tensor, given list"),
        (
            lambda: glu(random(2, 4), backend="npu_swiglu"),
            "it runs on npu.*These can: eager, naive",
        ),
    ],
)
def test_wrong_arguments(call: Any, says: str) -> None:
    with pytest.raises(ParametersInvalid, match=says):
        call()
