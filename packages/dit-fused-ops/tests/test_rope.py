"""Rotary position embedding against formulas written three other ways, on every backend of this machine."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.dispatch.store import read_decisions
from dit_fused_ops.errors import BackendRefused
from dit_fused_ops.rope import ROPE, rope_tables_from_complex, rotary_naive, rotary_position_embedding

HALF, INTERLEAVED = MODES = ("rotated_half", "rotated_interleaved")
LAYOUTS = ("BSND", "BNSD", "SBND")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Those that compute on CPU and whose first call does not take seconds.
BACKENDS = [each.name for each in ROPE.backends if not each.costly and (each.devices is None or "cpu" in each.devices)]
ONLY = {"split": HALF, "complex": INTERLEAVED}
B, S, N, D = 2, 5, 3, 12
# Computed in float32 and rounded once: half a unit in the last place, twice that for ties; in float32 two products and
# a sum of numbers under 8.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-14, "atol": 1e-14},
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 2e-6},
    torch.float16: {"rtol": 2.0**-11, "atol": 2e-6},
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arranged(layout: str, **sizes: int) -> list[int]:
    return [{"B": B, "S": S, "N": N, "D": D, **sizes}[axis] for axis in layout]


def along(layout: str, table: Tensor) -> Tensor:
    """[S, R] in the place of the tokens of four dimensions."""
    return table.reshape([len(table) if axis == "S" else 1 for axis in layout[:3]] + [table.shape[1]])


def pairs_of(angles: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return angles.cos().to(dtype), angles.sin().to(dtype)


def wide(table: Tensor, mode: str) -> Tensor:
    """One column a channel, as the callers of MindIE SD make it."""
    return torch.cat((table, table), -1) if mode == HALF else torch.stack((table, table), -1).flatten(-2)


def turned(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """Each pair (x, y) by its own rotation, in float64: x · cos - y · sin and x · sin + y · cos."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    width = 2 * cos.shape[-1]
    out = x.clone()
    first = slice(0, width // 2) if mode == HALF else slice(0, width, 2)
    second = slice(width // 2, width) if mode == HALF else slice(1, width, 2)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def assert_like(got: Any, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, **CLOSE[dtype])


def rotate(backend: str, x: Tensor, cos: Tensor, sin: Tensor, mode: str, **how: Any) -> Any:
    """Rotate with the backend; where it has no such pairs, check that it says so, and return None."""
    if ONLY.get(backend, mode) != mode:
        with pytest.raises(BackendRefused, match=r"must be the pairs.*These can: .*eager.*naive"):
            rotary_position_embedding(x, cos, sin, mode, backend=backend, **how)
        return None
    return rotary_position_embedding(x, cos, sin, mode, backend=backend, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["pair", "channel", "pair 4-D", "channel 4-D"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation(backend: str, mode: str, layout: str, form: str, tables: torch.dtype, dtype: torch.dtype) -> None:
    x, (cos, sin) = random(*arranged(layout), dtype=dtype), pairs_of(random(S, D // 2, seed=1), tables)
    a, b = (wide(t, mode) if "channel" in form else t for t in (cos, sin))
    if "4-D" in form:
        a, b = along(layout, a), along(layout, b)
    got = rotate(backend, x, a, b, mode, layout=layout)
    if got is not None:
        assert_like(got, turned(x, along(layout, cos), along(layout, sin), mode), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_of_float64_cost_no_accuracy(backend: str, mode: str) -> None:
    x, (cos, sin) = random(*arranged("BSND")), pairs_of(random(S, D // 2, seed=1, dtype=torch.float64), torch.float64)
    got = rotate(backend, x, cos, sin, mode)
    if got is not None:
        assert_like(got, turned(x, cos[:, None], sin[:, None], mode), torch.float32)


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_head_first(mode: str, head_first: bool) -> None:
    layout = "BNSD" if head_first else "BSND"
    x, (cos, sin) = random(*arranged(layout)), pairs_of(random(S, D // 2, seed=1))
    got = rotary_position_embedding(x, wide(cos, mode), wide(sin, mode), mode, head_first)
    assert_like(got, turned(x, along(layout, cos), along(layout, sin), mode), torch.float32)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 7, 5, 2), (3, 1, 2, 130), (2, 33, 1, 6)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, mode: str, shape: tuple[int, int, int, int]) -> None:
    x, (cos, sin) = random(*shape), pairs_of(random(shape[1], shape[3] // 2, seed=1))
    got = rotate(backend, x, cos, sin, mode)
    if got is not None:
        assert_like(got, turned(x, cos[:, None], sin[:, None], mode), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wan_as_diffusers_writes_it(backend: str) -> None:
    """Tables [1, S, 1, D] of equal neighbours; even channels of the cosine, odd ones of the sine."""
    x, (cos, sin) = random(*arranged("BSND"), dtype=torch.bfloat16), pairs_of(random(S, D // 2, seed=1))
    cos, sin = (wide(table, INTERLEAVED)[None, :, None] for table in (cos, sin))
    x1, x2 = x.double().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    even, odd = cos[..., 0::2].double(), sin[..., 1::2].double()
    wanted = torch.empty(x.shape, dtype=torch.float64)
    wanted[..., 0::2] = x1 * even - x2 * odd
    wanted[..., 1::2] = x1 * odd + x2 * even
    got = rotate(backend, x, cos, sin, INTERLEAVED)
    if got is not None:
        assert_like(got, wanted, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wan_as_the_paper_writes_it(backend: str) -> None:
    """Neighbours are a complex number, and the position multiplies it with one of length 1."""
    x = random(*arranged("BSND"))
    turns = torch.polar(torch.ones(S, D // 2, dtype=torch.float64), random(S, D // 2, seed=1, dtype=torch.float64))
    wanted = torch.view_as_real(
        torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2)) * turns[:, None]
    ).flatten(-2)
    got = rotate(backend, x, *rope_tables_from_complex(turns.to(torch.complex64)), INTERLEAVED)
    if got is not None:
        assert_like(got, wanted, torch.float32)


@pytest.mark.parametrize("wide_axes", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_of_four_dimensions(backend: str, layout: str, wide_axes: tuple[bool, bool, bool]) -> None:
    sizes = arranged(layout)
    shape = [size if is_wide else 1 for size, is_wide in zip(sizes[:3], wide_axes, strict=True)]
    x, (cos, sin) = random(*sizes), pairs_of(random(*shape, D // 2, seed=1))
    mode = ONLY.get(backend, HALF)
    assert_like(rotate(backend, x, cos, sin, mode, layout=layout), turned(x, cos, sin, mode), torch.float32)


@pytest.mark.parametrize("full", [False, True], ids=["pair", "channel"])
@pytest.mark.parametrize("rotary_dim", [2, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_some_channels(backend: str, mode: str, rotary_dim: int, full: bool) -> None:
    x, (cos, sin) = random(*arranged("BNSD"), dtype=torch.bfloat16), pairs_of(random(S, rotary_dim // 2, seed=1))
    a, b = (wide(t, mode) if full else t for t in (cos, sin))
    got = rotate(backend, x, a, b, mode, head_first=True, rotary_dim=rotary_dim)
    if got is not None:
        assert_like(got, turned(x, cos, sin, mode), torch.bfloat16)
        assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("mode", MODES)
def test_queries_and_keys_of_another_number_of_heads(mode: str) -> None:
    query, key, (cos, sin) = random(B, S, 6, D), random(B, S, 2, D, seed=2), pairs_of(random(S, D // 2, seed=1))
    both = rotary_position_embedding(query, cos, sin, mode, key=key)
    for got, x in zip(both, (query, key), strict=True):
        assert_like(got, turned(x, cos[:, None], sin[:, None], mode), torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_that_are_a_part_of_a_larger_tensor(backend: str, mode: str) -> None:
    _, x, _ = random(B, S, 3, N, D).unbind(2)
    strided, (cos, sin) = random(B, D, S, N).permute(0, 2, 3, 1), pairs_of(random(D // 2, S, seed=1).T)
    for query in (x, strided):
        got = rotate(backend, query, cos, sin, mode)
        if got is not None:
            assert_like(got, turned(query, cos[:, None], sin[:, None], mode), torch.float32)


def test_unfused_is_the_reference() -> None:
    x, cos, sin = random(*arranged("BSND")), random(S, D, seed=1), random(S, D, seed=2)
    for mode in MODES:
        got = rotary_position_embedding(x, cos, sin, mode, fused=False)
        assert torch.equal(got, rotary_naive(x, cos[:, None], sin[:, None], mode))


def test_a_rotation_keeps_lengths_and_angles_between_positions() -> None:
    """The law that the method is made for: q · k depends on the distance of their positions only."""
    frequencies = 0.3 ** torch.arange(D // 2, dtype=torch.float64)
    cos, sin = pairs_of(torch.outer(torch.arange(9, dtype=torch.float64), frequencies), torch.float64)
    query, key = (random(1, 1, 1, D, seed=seed, dtype=torch.float64).expand(1, 9, 1, D) for seed in (0, 1))
    for mode in MODES:
        q, k = rotary_position_embedding(query, cos, sin, mode, key=key)
        scores = q[0, :, 0] @ k[0, :, 0].T
        for distance in range(-8, 9):
            diagonal = scores.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("full", [False, True], ids=["pair", "channel"])
@pytest.mark.parametrize("rotary_dim", [None, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_x(backend: str, mode: str, rotary_dim: int | None, full: bool) -> None:
    x, (cos, sin) = random(2, 3, 2, 4), pairs_of(random(3, (rotary_dim or 4) // 2, seed=1), torch.float64)
    a, b = (wide(t, mode) if full else t for t in (cos, sin))
    if ONLY.get(backend, mode) == mode:
        leaf = x.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: rotate(backend, x, a, b, mode, rotary_dim=rotary_dim), leaf)


@pytest.mark.parametrize("full", [False, True], ids=["pair", "channel"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_gradients_of_the_tables(backend: str | None, mode: str, full: bool) -> None:
    """Of learned tables: in each column its own, as the formula has it."""
    if ONLY.get(backend or "", mode) != mode:
        return
    x = random(2, 3, 2, 4, dtype=torch.float64)
    cos, sin = (wide(t, mode) if full else t for t in pairs_of(random(3, 2, seed=1), torch.float64))

    def gradients(name: str | None) -> tuple[Tensor, ...]:
        leaves = [table.clone().requires_grad_() for table in (cos, sin)]
        result = rotary_position_embedding(x, leaves[0], leaves[1], mode, backend=name)
        return torch.autograd.grad((result * random(*x.shape, seed=9, dtype=torch.float64)).sum(), leaves)

    if full and backend == "complex":
        with pytest.raises(BackendRefused, match="gradient"):
            gradients(backend)
        return
    for one, other in zip(gradients(backend), gradients("naive"), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("mode", MODES)
def test_full_width_tables_that_are_no_rotation(mode: str, backend: str | None) -> None:
    """x · cos + rotate(x) · sin holds for them too: each channel of a pair has its own column."""
    x, cos, sin = random(*arranged("BSND")), random(S, D, seed=1), random(S, D, seed=2)
    if ONLY.get(backend or "", mode) != mode:
        with pytest.raises(BackendRefused, match="pairs"):
            rotary_position_embedding(x, cos, sin, mode, backend=backend)
        return
    got = rotary_position_embedding(x, cos, sin, mode, backend=backend)
    a, b = x.double().chunk(2, -1) if mode == HALF else (x.double()[..., 0::2], x.double()[..., 1::2])
    rotated = torch.cat((-b, a), -1) if mode == HALF else torch.stack((-b, a), -1).flatten(-2)
    assert_like(got, x.double() * cos.double()[:, None] + rotated * sin.double()[:, None], torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 20)),
    layout=st.sampled_from(LAYOUTS),
    mode=st.sampled_from(MODES),
    full=st.booleans(),
    turning=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    sizes: tuple[int, int, int, int], layout: str, mode: str, full: bool, turning: float, dtype: torch.dtype
) -> None:
    b, s, n, pairs = sizes
    turned_pairs = max(1, round(turning * pairs))
    x = random(*arranged(layout, B=b, S=s, N=n, D=2 * pairs), dtype=dtype)
    cos, sin = pairs_of(random(s, turned_pairs, seed=1))
    wide_cos, wide_sin = (wide(t, mode) if full else t for t in (cos, sin))
    got = rotary_position_embedding(x, wide_cos, wide_sin, mode, layout=layout, rotary_dim=2 * turned_pairs)
    assert_like(got, turned(x, along(layout, cos), along(layout, sin), mode), dtype)


@pytest.mark.parametrize("mode", MODES)
def test_runtime_mode_measures(mode: str, own_decisions: Path) -> None:
    x, (cos, sin) = random(2, 100, 3, 8, dtype=torch.bfloat16), pairs_of(random(100, 4, seed=1))
    with torch.no_grad(), dispatcher.configured(mode="runtime"):
        got = rotary_position_embedding(x, cos, sin, mode)
    assert_like(got, turned(x, cos[:, None], sin[:, None], mode), torch.bfloat16)
    (decision,) = read_decisions(own_decisions).values()
    assert not decision.rejected


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
@pytest.mark.parametrize("mode", MODES)
def test_compiled_is_right_too(mode: str) -> None:
    x, (cos, sin) = random(*arranged("BSND")), pairs_of(random(S, D // 2, seed=1))
    got = rotary_position_embedding(x, cos, sin, mode, backend="compiled")
    assert_like(got, turned(x, cos[:, None], sin[:, None], mode), torch.float32)
