"""Gates, scales and shifts against the same formula in float64, on every backend of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_fused_ops import pointwise
from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.dispatch.store import read_decisions
from dit_fused_ops.errors import BackendRefused, ParametersInvalid
from dit_fused_ops.pointwise import (
    MULTIPLY_ADD,
    backends,
    gather_residual_gate,
    gather_scale_shift,
    muls_add,
    residual_gate_add,
    residual_gate_add_naive,
    scale_shift,
    scale_shift_naive,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Those that compute on CPU and whose first call does not take seconds.
BACKENDS = [each.name for each in MULTIPLY_ADD.backends if each.devices in (None, frozenset({"cpu"}))]
FACTORS = [(7,), (1,), (1, 7), (5, 7), (2, 1, 7), (2, 5, 7), (1, 5, 1)]
# Computed in float32 and rounded once: half a unit in the last place, twice that for ties. In float32, two roundings
# of numbers under 32.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-14, "atol": 1e-14},
    torch.float32: {"rtol": 2e-6, "atol": 4e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 4e-6},
    torch.float16: {"rtol": 2.0**-11, "atol": 4e-6},
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_like(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, **CLOSE[dtype])


def run(backend: str, call: Any, *tensors: Tensor) -> Tensor | None:
    """Call with the backend; tiles have no use where one pass is as good, and the backend says so."""
    with torch.no_grad():
        dtypes = {tensor.dtype for tensor in tensors}
        halves = dtypes <= {torch.float16, torch.bfloat16}
        if backend == "tiled" and len(dtypes) == 1 and not (halves and call is scale_shift):
            with pytest.raises(BackendRefused, match="one pass of addcmul is as good"):
                call(*tensors, backend=backend)
            return None
        result: Tensor = call(*tensors, backend=backend)
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_gate_add(backend: str, factor: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y, gate = (
        random(2, 5, 7, dtype=dtype),
        random(2, 5, 7, seed=1, dtype=dtype),
        random(*factor, seed=2, dtype=dtype),
    )
    got = run(backend, residual_gate_add, x, y, gate)
    if got is not None:
        assert_like(got, x.double() + y.double() * gate.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_shift(backend: str, factor: tuple[int, ...], dtype: torch.dtype) -> None:
    x, scale, shift = random(2, 5, 7, dtype=dtype), random(*factor, seed=1, dtype=dtype), random(7, seed=2, dtype=dtype)
    got = run(backend, scale_shift, x, scale, shift)
    if got is not None:
        assert_like(got, x.double() * (1 + scale.double()) + shift.double(), dtype)


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 4), (2, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks(backend: str, shape: tuple[int, ...]) -> None:
    x, y, gate = random(*shape, dtype=torch.bfloat16), random(*shape, seed=1), random(1, seed=2)
    got = run(backend, residual_gate_add, x, y, gate)
    assert got is not None
    assert_like(got, x.double() + y.double() * gate.double(), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_residual_and_bfloat16_update(backend: str) -> None:
    """Wan's: nothing is rounded to bfloat16 on the way."""
    x, y, gate = random(2, 5, 7), random(2, 5, 7, seed=1).bfloat16(), random(2, 1, 7, seed=2).bfloat16()
    got = run(backend, residual_gate_add, x, y, gate)
    assert got is not None
    assert_like(got, x.double() + y.double() * gate.double(), torch.float32)


def test_more_rows_than_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TILE", 64)
    x, y, gate = random(2, 31, 20, dtype=torch.bfloat16), random(2, 31, 20, seed=1), random(2, 31, 1, seed=2)
    assert_like(residual_gate_add(x, y, gate, backend="tiled"), x.double() + y.double() * gate.double(), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_larger_tensors(backend: str) -> None:
    x, y = random(5, 2, 7).transpose(0, 1).bfloat16(), random(2, 5, 14, seed=1)[..., ::2]
    gate = random(2, 6, 7, seed=2).chunk(6, dim=1)[4]
    got = run(backend, residual_gate_add, x, y, gate)
    assert got is not None
    assert_like(got, x.double() + y.double() * gate.double(), torch.bfloat16)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=str)
def test_gathering(shape: tuple[int, ...], integers: torch.dtype) -> None:
    indices = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).to(integers)
    x, y, one, two = random(2, 5, 7), random(2, 5, 7, seed=1), random(3, 7, seed=2), random(3, 7, seed=3)
    rows = indices.long()
    assert_like(gather_residual_gate(x, y, one, indices), (x + y * one[rows]).double(), torch.float32)
    assert_like(gather_scale_shift(x, one, two, indices), (x * (1 + one[rows]) + two[rows]).double(), torch.float32)


def test_gathering_has_a_gradient_of_the_table() -> None:
    table, indices = random(3, 7).double().requires_grad_(), torch.tensor([0, 2, 2, 0, 0])
    x, y = random(2, 5, 7, seed=1).double(), random(2, 5, 7, seed=2).double()
    assert torch.autograd.gradcheck(lambda t: gather_residual_gate(x, y, t, indices), table)
    assert torch.autograd.gradcheck(lambda t: gather_scale_shift(x, t, t, indices), table)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_muls_add(dtype: torch.dtype) -> None:
    x, y = random(2, 5, 7, dtype=dtype), random(2, 5, 7, seed=1, dtype=dtype)
    assert_like(muls_add(x, y, 0.37), x.double() * 0.37 + y.double(), dtype)
    assert_like(muls_add(x, y, 2), x.double() * 2 + y.double(), dtype)


@pytest.mark.parametrize("backend", ["addcmul", "naive"])
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("plus_one", [True, False])
def test_gradients(plus_one: bool, factor: tuple[int, ...], backend: str) -> None:
    shapes = (factor if plus_one else (2, 5, 7), (2, 5, 7), factor)
    tensors = [random(*shape, seed=n, dtype=torch.float64).requires_grad_() for n, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *t: dispatcher(MULTIPLY_ADD, t, (plus_one,), named=backend), tensors)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    ones=st.lists(st.booleans(), min_size=4, max_size=4),
    dropped=st.integers(0, 3),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
)
def test_any_shape(shape: list[int], ones: list[bool], dropped: int, dtypes: tuple[torch.dtype, ...]) -> None:
    factor = [1 if one else size for size, one in zip(shape, ones, strict=False)][dropped:]
    x, y = random(*shape, dtype=dtypes[0]), random(*shape, seed=1, dtype=dtypes[1])
    gate = random(*factor, seed=2, dtype=dtypes[2])
    narrow = dtypes[0] if torch.float64 in dtypes else max(dtypes[:1], key=lambda d: torch.finfo(d).bits)
    with torch.no_grad():
        assert_like(residual_gate_add(x, y, gate), x.double() + y.double() * gate.double(), narrow)
        assert_like(scale_shift(x, gate, gate), x.double() * (1 + gate.double()) + gate.double(), narrow)


def test_references_are_the_formulas() -> None:
    x, y, gate = random(2, 5, 7), random(2, 5, 7, seed=1), random(7, seed=2)
    assert torch.equal(residual_gate_add_naive(x, y, gate), x + y * gate)
    assert torch.equal(scale_shift_naive(x, gate, gate), gate + x * (1 + gate))
    assert residual_gate_add_naive(x.bfloat16(), y.bfloat16(), gate).dtype == torch.float32


def test_runtime_mode_measures(own_decisions: Path) -> None:
    x, y, gate = (random(2, 40, 64, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    with torch.no_grad(), dispatcher.configured(mode="runtime"):
        assert_like(residual_gate_add(x, y, gate.float()), x.double() + y.double() * gate.double(), torch.bfloat16)
        scale_shift(x[0, 0], gate[0, 0], y[0, 0])
    decisions = read_decisions(own_decisions)
    assert len(decisions) == 2
    assert not any(decision.rejected for decision in decisions.values())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_compiled_is_right_too() -> None:
    x, y, gate = random(2, 5, 7), random(2, 5, 7, seed=1), random(7, seed=2)
    assert_like(residual_gate_add(x, y, gate, backend="compiled"), (x + y * gate).double(), torch.float32)


def both(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return scale_shift(residual_gate_add(x, y, gate), gate, gate)


def test_under_torch_itself() -> None:
    tensors = (random(2, 5, 7), random(2, 5, 7, seed=1), random(2, 1, 7, seed=2))
    wanted = both(*tensors)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(*tensors), wanted)
    found = torch.func.grad(lambda x: both(x, *tensors[1:]).sum())(tensors[0])
    torch.testing.assert_close(found, (1 + tensors[2]).expand(2, 5, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(both(*tensors), wanted)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return both(x, x, gate)

    tensors = (random(2, 5, 7), random(2, 1, 7, seed=2))
    exported = torch.export.export(Module(), tensors)
    torch.testing.assert_close(exported.module()(*tensors), Module()(*tensors))


# Wrong types are given on purpose.
gate_add: Any = pointwise.residual_gate_add
shifted: Any = pointwise.scale_shift
muls: Any = pointwise.muls_add
gather_gate: Any = pointwise.gather_residual_gate
gather_shift: Any = pointwise.gather_scale_shift
X, GATE, TABLE = random(2, 5, 7), random(2, 7), random(3, 7)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: gate_add(X, X, GATE),
            r"gate \[2, 7\] does not broadcast to y \[2, 5, 7\].*is \[B, 1, H\]",
        ),
        (
            lambda: gate_add(X, X[:1], GATE),
            r"x and y must have one shape, given \[2, 5, 7\] and \[1, 5, 7\]",
        ),
        (lambda: gate_add(X, 1.0, GATE), "y must be a Tensor, given float"),
        (lambda: gate_add(X, X, X.to("meta")), "gate is on meta and x on cpu; move them"),
        (lambda: shifted(X, GATE, X), r"scale \[2, 7\] does not broadcast to x \[2, 5, 7\]"),
        (lambda: shifted(X, X, random(1, 2, 5, 7)), r"shift \[1, 2, 5, 7\] does not broadcast to x"),
        (lambda: shifted(X, X.int(), X), "scale must hold floating point numbers, given torch.int32"),
        (
            lambda: shifted(X, X, X, backend="fast"),
            "multiply_add has no backend 'fast', legal are .*addcmul",
        ),
        (lambda: muls(X, GATE, 1.0), r"one shape, given \[2, 5, 7\] and \[2, 7\]"),
        (lambda: muls(X, X, GATE), "scale must be a number, given Tensor; residual_gate_add takes tensors"),
        (lambda: muls(None, X, 1.0), "x must be a Tensor, given NoneType"),
        (
            lambda: gather_gate(X, X, TABLE, torch.ones(5)),
            r"int32 or int64, given torch.float32.*\.long\(\)",
        ),
        (lambda: gather_gate(X, X, TABLE, [0]), r"indices must be a Tensor, given \[0\] of list"),
        (
            lambda: gather_gate(X, X, X, torch.arange(3)),
            r"gate_table must be \[M, H\], given the shape",
        ),
        (
            lambda: gather_shift(X, TABLE, TABLE, torch.zeros(4).int()),
            r"\[4, 7\] does not broadcast to x",
        ),
    ],
)
def test_wrong_arguments(call: Any, says: str) -> None:
    with pytest.raises(ParametersInvalid, match=says) as caught:
        call()
    assert isinstance(caught.value, ValueError)
