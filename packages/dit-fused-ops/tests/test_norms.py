"""Norms with what surrounds them, against torch's own norms in float64, on every backend of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.dispatch.search import relative_error
from dit_fused_ops.dispatch.store import read_decisions
from dit_fused_ops.errors import BackendRefused
from dit_fused_ops.norms import (
    NORM,
    RMSNorm,
    fast_layernorm,
    layernorm_scale_shift,
    norm_naive,
    residual_gate_norm_naive,
    residual_gate_norm_scale_shift,
    rms_norm,
    rmsnorm_scale_shift,
)
from dit_fused_ops.pointwise import backends as pointwise_backends

EPS = 1e-6
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Those that compute on CPU and whose first call does not take seconds.
BACKENDS = [each.name for each in NORM.backends if each.devices in (None, frozenset({"cpu"}))]
SHAPES = [(1, 1, 2), (2, 3, 7), (1, 5, 33), (3, 2, 64), (2, 130, 1025)]
FORMS = ("plain", "sample", "token", "shared", "shared tokens")

# The result is rounded once to its dtype, half a unit in the last place of it: 2^-9 of a bfloat16, 2^-12 of a float16;
# twice that leaves room for a tie. Sums of float32 of at most 1025 terms, in another order, differ by some 10^-6.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2.0**-11, "atol": 1e-5},
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vector(form: str, shape: tuple[int, int, int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    b, s, h = shape
    forms = {"plain": (b, h), "sample": (b, 1, h), "token": (b, s, h), "shared": (1, 1, h), "shared tokens": (1, s, h)}
    return random(*forms[form], seed=seed, dtype=dtype)


def norm_module(kind: str, hidden: int, affine: bool = True) -> nn.Module:
    if kind == "layer":
        module: nn.Module = nn.LayerNorm(hidden, EPS, elementwise_affine=affine)
    elif affine:
        module = RMSNorm(hidden, EPS)
    else:
        module = nn.RMSNorm(hidden, EPS, elementwise_affine=False)
    for seed, parameter in enumerate(module.parameters()):
        parameter.data.add_(random(hidden, seed=20 + seed))
    return module


def plain(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm by torch, in float64."""
    weight, bias = (t.double() if (t := getattr(norm, name, None)) is not None else None for name in ("weight", "bias"))
    shape, x = x.shape[-1:], x.double()
    return (
        F.layer_norm(x, shape, weight, bias, EPS)
        if isinstance(norm, nn.LayerNorm)
        else F.rms_norm(x, shape, weight, EPS)
    )


def modulated(normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    scale, shift = (t.double() if t.dim() == 3 else t.double()[:, None] for t in (scale, shift))
    return normed * (1 + scale) + shift


def assert_like(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, **CLOSE[dtype])


def run(backend: str, call: Any, kind: str = "layer", *forms: str | None) -> Any:
    """Call with the backend; where it cannot, check that it says so, and return None."""
    with torch.no_grad():
        if backend == "folded" and (kind == "rms" or {"token", "shared tokens"} & set(forms)):
            with pytest.raises(BackendRefused, match=r"does not honour: rms|must be one vector a sample"):
                call(backend)
            return None
        return call(backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_norms(backend: str, affine: bool, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm: Any = norm_module(kind, shape[-1], affine)
    x = random(*shape, dtype=dtype)
    if kind == "layer":
        got = run(backend, lambda name: fast_layernorm(norm, x, backend=name))
    else:
        got = run(backend, lambda name: rms_norm(x, norm.weight, EPS, backend=name), "rms")
    if got is not None:
        assert_like(got, plain(norm, x), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_modulation(backend: str, kind: str, affine: bool, form: str, dtype: torch.dtype) -> None:
    shape = (2, 5, 19)
    norm, x = norm_module(kind, 19, affine), random(*shape, dtype=dtype)
    scale, shift = (vector(form, shape, seed, dtype) for seed in (1, 2))
    function: Any = layernorm_scale_shift if kind == "layer" else rmsnorm_scale_shift
    got = run(backend, lambda name: function(norm, x, scale, shift, backend=name), kind, form)
    if got is not None:
        assert_like(got, modulated(plain(norm, x), scale, shift), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_form", [None, *FORMS])
@pytest.mark.parametrize("form", [None, "sample", "token"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_residual(backend: str, kind: str, form: str | None, gate_form: str | None, dtype: torch.dtype) -> None:
    shape = (2, 5, 19)
    norm, x, y = norm_module(kind, 19), random(*shape, dtype=dtype), random(*shape, seed=1, dtype=torch.bfloat16)
    gate = None if gate_form is None else vector(gate_form, shape, 2, torch.bfloat16)
    scale, shift = (None if form is None else vector(form, shape, seed, dtype) for seed in (3, 4))

    def call(name: str) -> tuple[Tensor, Tensor]:
        return residual_gate_norm_scale_shift(norm, x, y, gate, scale, shift, backend=name)

    if (got := run(backend, call, kind, form)) is None:
        return
    residual, normed = got
    opened = 1.0 if gate is None else (gate if gate.dim() == 3 else gate[:, None]).double()
    assert_like(residual, x.double() + y.double() * opened, dtype)
    # From the residual that was returned: a tie that rounds the other way is not the norm's error.
    wanted = plain(norm, residual)
    assert_like(normed, wanted if scale is None or shift is None else modulated(wanted, scale, shift), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_of_the_residual_as_it_is_rounded(backend: str) -> None:
    """Numbers near 256 are 2 apart in bfloat16, which the norm sees."""
    norm, x, y = norm_module("layer", 19), 256 + random(2, 5, 19, dtype=torch.bfloat16), random(2, 5, 19, seed=1)
    residual, normed = run(backend, lambda name: residual_gate_norm_scale_shift(norm, x, y, backend=name))
    assert_like(normed, plain(norm, residual), torch.bfloat16)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_one_tile(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise_backends, "TILE", 64)
    shape = (2, 31, 20)
    norm, x, y = norm_module(kind, 20), random(*shape, dtype=dtype), random(*shape, seed=1)
    gate, scale, shift = vector("shared", shape, 2), vector("token", shape, 3), vector("plain", shape, 4)
    with torch.no_grad():
        residual, normed = residual_gate_norm_scale_shift(norm, x, y, gate, scale, shift, backend="tiled")
    assert_like(residual, x.double() + y.double() * gate.double(), dtype)
    assert_like(normed, modulated(plain(norm, residual), scale, shift), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_larger_tensors(backend: str) -> None:
    norm = norm_module("layer", 19)
    x, y = random(5, 2, 19).transpose(0, 1), random(2, 5, 38, seed=1)[..., ::2]
    _, scale, gate, *_, shift = random(2, 6, 19, seed=2).chunk(6, dim=1)

    def call(name: str) -> tuple[Tensor, Tensor]:
        return residual_gate_norm_scale_shift(norm, x, y, gate, scale, shift, backend=name)

    residual, normed = run(backend, call)
    assert_like(residual, x.double() + y.double() * gate.double(), torch.float32)
    assert_like(normed, modulated(plain(norm, residual), scale, shift), torch.float32)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 6), (1, 2, 1, 2, 1, 2, 1, 6)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks(backend: str, shape: tuple[int, ...]) -> None:
    x, norm = random(*shape), norm_module("rms", 6)
    got = run(backend, lambda name: norm(x, backend=name), "rms")
    if got is not None:
        assert_like(got, plain(norm, x), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_equal_numbers_gives_the_shift(backend: str, dtype: torch.dtype) -> None:
    """Such as one channel alone: nothing but eps stands under the root, which raises rounding by 1 / √eps."""
    norm: Any = norm_module("layer", 1)
    x, zero, shift = random(2, 3, 1, dtype=dtype), torch.zeros(2, 1), random(2, 1, seed=1)
    got = run(backend, lambda name: layernorm_scale_shift(norm, x, zero, shift, backend=name))
    wanted = (norm.bias.double() + shift.double())[:, None].expand(2, 3, 1)
    raised = torch.finfo(torch.float32).eps * float(x.abs().max() * norm.weight.detach().abs().max()) / EPS**0.5
    torch.testing.assert_close(got.double(), wanted, rtol=CLOSE[dtype]["rtol"], atol=raised)


def test_layer_norm_over_several_dimensions() -> None:
    norm = nn.LayerNorm((3, 5))
    norm.weight.data, norm.bias.data = random(3, 5, seed=1), random(3, 5, seed=2)
    x = random(2, 4, 3, 5)
    torch.testing.assert_close(fast_layernorm(norm, x), norm(x))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_modes_are_all_accurate_here(mode: int) -> None:
    norm, x = nn.LayerNorm(19, dtype=torch.float16), random(2, 5, 19, dtype=torch.float16)
    assert_like(fast_layernorm(norm, x, mode), F.layer_norm(x.double(), (19,)), torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fused_or_not_the_dtype_is_that_of_the_input(dtype: torch.dtype) -> None:
    norm, x = RMSNorm(8), random(2, 3, 8, dtype=dtype)
    assert norm(x).dtype == norm(x, if_fused=False).dtype == norm(x, False).dtype == dtype


def test_unfused_is_the_reference() -> None:
    norm, x, y = norm_module("layer", 19), random(2, 5, 19), random(2, 5, 19, seed=1)
    scale, shift, gate = (random(2, 1, 19, seed=seed) for seed in (2, 3, 4))
    how: Any = {"kind": "layer", "eps": EPS}
    assert isinstance(norm, nn.LayerNorm)
    wanted = norm_naive(x, norm.weight, norm.bias, scale, shift, **how)
    assert torch.equal(layernorm_scale_shift(norm, x, scale, shift, fused=False), wanted)
    pair = residual_gate_norm_naive(x, y, gate, norm.weight, norm.bias, scale, shift, **how)
    got = residual_gate_norm_scale_shift(norm, x, y, gate, scale, shift, fused=False)
    assert all(torch.equal(one, other) for one, other in zip(got, pair, strict=True))
    bare = residual_gate_norm_naive(x, y, None, norm.weight, norm.bias, None, None, **how)
    assert torch.equal(residual_gate_norm_scale_shift(norm, x, y, fused=False)[1], bare[1])


def test_torch_rms_norm_without_eps_takes_that_of_the_dtype() -> None:
    norm, x, zero = nn.RMSNorm(8), random(1, 3, 8) * 1e-3, torch.zeros(1, 1, 8)
    torch.testing.assert_close(rmsnorm_scale_shift(norm, x, zero, zero), norm(x))


def test_the_module_is_a_module() -> None:
    norm = RMSNorm(8)
    assert list(norm.state_dict()) == ["weight"]
    assert torch.equal(norm.weight, torch.ones(8))
    assert repr(norm) == "RMSNorm(8, eps=1e-06)"


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("form", ["plain", "token", "shared"])
@pytest.mark.parametrize("backend", ["folded", "eager", "naive"])
def test_gradients(backend: str, form: str, kind: str) -> None:
    """Of every tensor, against finite differences in float64."""
    if backend == "folded" and (kind == "rms" or form == "token"):
        return  # refused, as test_modulation shows
    shape = (2, 3, 4)
    tensors = [random(*shape, dtype=torch.float64), 1 + random(4, seed=1, dtype=torch.float64)]
    tensors += [random(4, seed=2, dtype=torch.float64), *(vector(form, shape, seed, torch.float64) for seed in (3, 4))]
    tensors += [random(*shape, seed=5, dtype=torch.float64), vector(form, shape, 6, torch.float64)]

    def call(*given: Tensor) -> Any:
        return dispatcher(NORM, given, (kind, EPS, 0, False, True, None), named=backend)

    assert torch.autograd.gradcheck(call, [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", [None, "folded", "eager"])
def test_gradients_of_halves_are_summed_in_float32(backend: str | None, dtype: torch.dtype, kind: str) -> None:
    """Of 100 rows; each gradient is rounded once, to the dtype of its tensor."""
    shape = (2, 50, 64)
    tensors = [random(*shape, dtype=dtype), 1 + random(64, seed=1), random(64, seed=2)]
    tensors += [vector("plain", shape, 3, dtype), vector("sample", shape, 4), random(*shape, seed=5, dtype=dtype)]
    tensors += [vector("shared", shape, 6, dtype)]
    slopes = random(*shape, seed=7), random(*shape, seed=8)

    def gradients(name: str | None) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        results = dispatcher(NORM, tuple(leaves), (kind, EPS, 0, False, True, None), named=name)
        total: Tensor = sum((each.float() * slope).sum() for each, slope in zip(results, slopes, strict=True))
        return torch.autograd.grad(total, leaves)

    if backend == "folded":
        with pytest.raises(BackendRefused, match=r"gradients of weight and bias in 16 bits|does not honour: rms"):
            gradients(backend)
        return
    for got, wanted in zip(gradients(backend), gradients("naive"), strict=True):
        unit = torch.finfo(wanted.dtype).eps if wanted.dtype != torch.float32 else CLOSE[torch.float32]["rtol"]
        assert relative_error(got.float(), wanted.float()) <= unit


def test_no_backend_without_gradient_when_one_is_needed() -> None:
    norm, x = nn.LayerNorm(8), random(1, 3, 8).requires_grad_()
    with pytest.raises(BackendRefused, match=r"tiled cannot carry out.*no gradient; call it under torch.no_grad\(\)"):
        fast_layernorm(norm, x, backend="tiled")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)),
    kind=st.sampled_from(["layer", "rms"]),
    forms=st.tuples(*[st.sampled_from(FORMS)] * 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_the_reference(
    sizes: tuple[int, int, int], kind: str, forms: tuple[str, str, str], dtype: torch.dtype, seed: int
) -> None:
    norm, x, y = norm_module(kind, sizes[2]), random(*sizes, seed=seed, dtype=dtype), random(*sizes, seed=seed + 1)
    gate, scale, shift = (vector(form, sizes, seed + 2 + n, dtype) for n, form in enumerate(forms))
    with torch.no_grad():
        residual, normed = residual_gate_norm_scale_shift(norm, x, y, gate, scale, shift)
    assert_like(residual, x.double() + y.double() * (gate if gate.dim() == 3 else gate[:, None]).double(), dtype)
    assert_like(normed, modulated(plain(norm, residual), scale, shift), dtype)


def test_runtime_mode_measures_and_chooses_a_right_one(own_decisions: Path) -> None:
    norm, x = nn.LayerNorm(64, EPS), random(2, 40, 64, dtype=torch.bfloat16)
    scale, shift, y = random(2, 64, seed=1), random(2, 64, seed=2), random(2, 40, 64, seed=3)
    with torch.no_grad(), dispatcher.configured(mode="runtime"):
        got = layernorm_scale_shift(norm, x, scale, shift)
        residual, normed = residual_gate_norm_scale_shift(norm, x, y, scale, scale, shift)
        RMSNorm(64)(x)
    assert_like(got, modulated(plain(norm, x), scale, shift), torch.bfloat16)
    assert_like(normed, modulated(plain(norm, residual), scale, shift), torch.bfloat16)
    decisions = read_decisions(own_decisions)
    assert len(decisions) == 3
    assert not any(decision.rejected for decision in decisions.values())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_compiled_is_right_too() -> None:
    norm, x, y, scale = nn.LayerNorm(19, EPS), random(2, 5, 19), random(2, 5, 19, seed=1), random(2, 19, seed=2)
    got = residual_gate_norm_scale_shift(norm, x, y, scale, scale, scale, backend="compiled")
    scale = scale[:, None]
    wanted = residual_gate_norm_naive(x, y, scale, None, None, scale, scale, kind="layer", eps=EPS)
    torch.testing.assert_close(got, wanted)
