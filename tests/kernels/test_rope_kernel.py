"""The rope kernel: both modes, every layout, both widths of the tables, some channels or all, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from interpreting import check, check_gradients, outputs  # type: ignore[import-not-found]
from torch import Tensor

from dit_fused_ops.rope import ROPE

MODES = ("rotated_half", "rotated_interleaved")
LAYOUTS = ("BSND", "BNSD", "SBND")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
B, S, N, D = 2, 5, 3, 12


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arranged(layout: str, **sizes: int) -> list[int]:
    return [{"B": B, "S": S, "N": N, "D": D, **sizes}[axis] for axis in layout]


def tables(*shape: int, mode: str, half: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Cosine and sine of random angles, one column a pair or a channel; `shape` ends with the number of channels."""
    angles = random(*shape[:-1], shape[-1] // 2, seed=3)
    both = [angles.cos().to(dtype), angles.sin().to(dtype)]
    if half:
        return both
    return [torch.cat((t, t), -1) if mode == "rotated_half" else t.repeat_interleave(2, -1) for t in both]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [True, False], ids=["pair", "channel"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(layout: str, mode: str, half: bool, dtype: torch.dtype) -> None:
    x = random(*arranged(layout), dtype=dtype)
    check(ROPE, [x, *tables(S, D, mode=mode, half=half)], (mode, False, True, layout, None))


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (3, 7, 6), (2, 40, 130)])
@pytest.mark.parametrize("mode", MODES)
def test_odd_sizes(tokens: int, heads: int, dim: int, mode: str) -> None:
    x = random(1, tokens, heads, dim)
    check(ROPE, [x, *tables(tokens, dim, mode=mode, half=True)], (mode, False, True, None, None))


def test_more_heads_than_one_program_takes() -> None:
    x = random(1, 2, 70, 128)
    check(ROPE, [x, *tables(2, 128, mode="rotated_half", half=True)], ("rotated_half", False, True, None, None))


@pytest.mark.parametrize("half", [True, False], ids=["pair", "channel"])
@pytest.mark.parametrize("mode", MODES)
def test_some_channels(mode: str, half: bool) -> None:
    x = random(*arranged("BNSD"), dtype=torch.bfloat16)
    check(ROPE, [x, *tables(S, 8, mode=mode, half=half)], (mode, True, True, None, 8))


@pytest.mark.parametrize("wide", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_of_four_dimensions(layout: str, wide: tuple[bool, bool, bool]) -> None:
    sizes = arranged(layout)
    shape = [size if is_wide else 1 for size, is_wide in zip(sizes[:3], wide, strict=True)]
    given = tables(*shape, D, mode="rotated_half", half=True)
    check(ROPE, [random(*sizes), *given], ("rotated_half", False, True, layout, None))


@pytest.mark.parametrize("mode", MODES)
def test_tables_that_are_no_rotation(mode: str) -> None:
    """Each channel of a pair has its own column, as the formula says."""
    x, cos, sin = random(*arranged("BSND")), random(S, D, seed=1), random(S, D, seed=2)
    check(ROPE, [x, cos, sin], (mode, False, True, None, None))
    check_gradients(ROPE, [x.requires_grad_(), cos, sin], (mode, False, True, None, None))


def test_queries_that_are_a_part_of_a_larger_tensor() -> None:
    query, *_ = random(B, S, 3, N, D).unbind(2)
    table = torch.polar(torch.ones(S, D // 2), random(S, D // 2, seed=1))
    options = ("rotated_interleaved", False, True, None, None)
    check(ROPE, [query, table.real, table.imag], options)
    check(ROPE, [random(B, S, D, N).transpose(2, 3), table.real, table.imag], options)


def test_no_tokens() -> None:
    (empty,) = outputs(
        ROPE, "triton", [random(B, 0, N, D), *[random(0, D // 2)] * 2], (*MODES[:1], False, True, None, None)
    )
    assert empty.shape == (B, 0, N, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotary_dim", [None, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(layout: str, mode: str, rotary_dim: int | None, dtype: torch.dtype) -> None:
    x = random(*arranged(layout), dtype=dtype).requires_grad_()
    given = tables(S, rotary_dim or D, mode=mode, half=False)
    check_gradients(ROPE, [x, *given], (mode, False, True, layout, rotary_dim))
