"""The kernel of residual_gate_add and scale_shift: every way to broadcast, mixed dtypes, forward and backward."""

from __future__ import annotations

import pytest
import torch
from interpreting import check, check_gradients, outputs  # type: ignore[import-not-found]
from torch import Tensor

from dit_fused_ops.pointwise import MULTIPLY_ADD

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACTORS = ((19,), (1,), (1, 19), (3, 19), (2, 1, 19), (2, 3, 19), (1, 3, 1))
BOTH = pytest.mark.parametrize("plus_one", [False, True], ids=["gate", "scale"])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@BOTH
def test_forward(plus_one: bool, factor: tuple[int, ...], dtype: torch.dtype) -> None:
    base = random(*(factor if plus_one else (2, 3, 19)), seed=1, dtype=dtype)
    given = [base, random(2, 3, 19, dtype=dtype), random(*factor, seed=2, dtype=dtype)]
    check(MULTIPLY_ADD, given, (plus_one,))


@pytest.mark.parametrize("shape", [(1,), (5,), (4, 1), (3, 2049), (2, 2, 2, 5), (2, 1, 4097)], ids=str)
@BOTH
def test_shapes(plus_one: bool, shape: tuple[int, ...]) -> None:
    check(MULTIPLY_ADD, [random(*shape, seed=seed) for seed in range(3)], (plus_one,))


def test_a_bfloat16_update_of_a_float32_residual() -> None:
    low = {"dtype": torch.bfloat16}
    check(MULTIPLY_ADD, [random(2, 3, 19), random(2, 3, 19, seed=1, **low), random(2, 1, 19, seed=2, **low)], (False,))


def test_tensors_that_are_not_contiguous() -> None:
    gate = random(2, 6, 38).chunk(6, dim=1)[3][..., ::2]
    check(MULTIPLY_ADD, [random(2, 19, 3).transpose(1, 2), random(3, 2, 19, seed=1).transpose(0, 1), gate], (False,))


def test_no_rows() -> None:
    (empty,) = outputs(MULTIPLY_ADD, "triton", [random(2, 0, 5), random(2, 0, 5), random(5)], (False,))
    assert empty.shape == (2, 0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [(19,), (2, 1, 19), (2, 3, 19)], ids=str)
@BOTH
def test_gradients(plus_one: bool, factor: tuple[int, ...], dtype: torch.dtype) -> None:
    base = random(*(factor if plus_one else (2, 3, 19)), seed=1, dtype=dtype)
    given = [base, random(2, 3, 19, dtype=dtype), random(*factor, seed=2, dtype=dtype)]
    check_gradients(MULTIPLY_ADD, [tensor.requires_grad_() for tensor in given], (plus_one,))
