"""The norm kernel: both kinds, with and without weight, bias, modulation, residual and gate."""

from __future__ import annotations

import pytest
import torch
from interpreting import check, check_gradients, outputs  # type: ignore[import-not-found]
from torch import Tensor

from dit_fused_ops.norms import NORM

EPS = 1e-6
KINDS = ("layer", "rms")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One column, one less and one more than a power of two, several warps; single rows and samples.
SHAPES = ((1, 1, 1), (2, 3, 7), (1, 5, 33), (3, 2, 64), (2, 1, 1537))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    affine: str = "",
    vectors: str = "",
    gate: str = "",
    residual: bool = False,
) -> list[Tensor | None]:
    """x, weight, bias, scale, shift, y, gate; `vectors` and `gate` say along what they vary."""
    b, s, h = shape
    forms = {"plain": (b, h), "sample": (b, 1, h), "token": (b, s, h), "shared": (1, 1, h), "shared tokens": (1, s, h)}
    weight = 1 + random(h, seed=1) if "weight" in affine else None
    bias = random(h, seed=2) if "bias" in affine else None
    scale, shift = (random(*forms[vectors], seed=n, dtype=dtype) if vectors else None for n in (3, 4))
    y = random(*shape, seed=5, dtype=dtype) if residual else None
    opened = random(*forms[gate], seed=6, dtype=dtype) if gate else None
    return [random(*shape, dtype=dtype), weight, bias, scale, shift, y, opened]


def options(kind: str) -> tuple[str, float, int, bool, bool, None]:
    return (kind, EPS, 0, False, True, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    check(NORM, parts(shape, dtype, affine="weight bias"), options(kind))


@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 2, 3, 6)], ids=str)
def test_any_rank(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    check(NORM, [x, None, None, None, None, None, None], options("layer"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", ["", "weight", "weight bias"])
@pytest.mark.parametrize("vectors", ["plain", "sample", "token", "shared", "shared tokens"])
def test_modulated(vectors: str, affine: str, kind: str, dtype: torch.dtype) -> None:
    check(NORM, parts((2, 3, 19), dtype, affine=affine, vectors=vectors), options(kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vectors", ["", "sample", "token"])
@pytest.mark.parametrize("gate", ["", "plain", "token", "shared"])
def test_after_a_residual(gate: str, vectors: str, kind: str, dtype: torch.dtype) -> None:
    check(NORM, parts((2, 3, 19), dtype, vectors=vectors, gate=gate, residual=True), options(kind))


def test_update_of_another_dtype() -> None:
    """Wan's: a float32 residual, an update and a modulation of bfloat16."""
    x, *_, gate = given = parts((2, 3, 19), affine="weight bias", vectors="sample", gate="sample", residual=True)
    given[5] = random(2, 3, 19, seed=5, dtype=torch.bfloat16)
    assert x is not None
    assert gate is not None
    given[6] = gate.bfloat16()
    check(NORM, given, options("layer"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_of_the_residual_as_it_is_rounded(kind: str) -> None:
    """Numbers near 256 are 2 apart in bfloat16, which the norm sees."""
    given = parts((2, 3, 19), torch.bfloat16, residual=True)
    assert given[0] is not None
    given[0] = given[0] + 256
    residual, normed = outputs(NORM, "triton", given, options(kind))
    (wanted,) = outputs(NORM, "naive", [residual, *[None] * 6], options(kind))
    torch.testing.assert_close(normed, wanted)


def test_tensors_that_are_not_contiguous() -> None:
    x, y = random(2, 19, 3).transpose(1, 2), random(2, 3, 38, seed=1)[..., ::2]
    vectors = random(2, 6, 19, seed=2).chunk(6, dim=1)
    strided = random(2, 1, 38, seed=3)[..., ::2]
    check(NORM, [x, random(38, seed=4)[::2], None, vectors[0], strided, y, vectors[5]], options("layer"))


def test_shift_and_scale_may_have_several_forms() -> None:
    given = parts((2, 3, 19), vectors="token")
    given[4] = random(1, 19, seed=9)
    check(NORM, given, options("rms"))


def test_no_rows() -> None:
    (empty,) = outputs(NORM, "triton", parts((2, 0, 8), vectors="sample"), options("layer"))
    assert empty.shape == (2, 0, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("affine", "vectors", "gate", "residual"),
    [
        ("weight bias", "", "", False),
        ("", "sample", "", False),
        ("weight", "token", "", False),
        ("", "shared", "plain", True),
        ("weight bias", "token", "token", True),
        ("weight bias", "", "", True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(affine: str, vectors: str, gate: str, residual: bool, kind: str, dtype: torch.dtype) -> None:
    given = parts((2, 3, 19), dtype, affine=affine, vectors=vectors, gate=gate, residual=residual)
    for tensor in given:
        if tensor is not None:
            tensor.requires_grad_()
    check_gradients(NORM, given, options(kind))


def test_gradient_of_some_tensors_only() -> None:
    given = parts((2, 3, 19), affine="weight", vectors="sample", gate="sample", residual=True)
    for index in (1, 6):
        tensor = given[index]
        assert tensor is not None
        tensor.requires_grad_()
    check_gradients(NORM, given, options("layer"))


@pytest.mark.parametrize("trained", [1, 2, 3, 4], ids=["weight", "bias", "scale", "shift"])
def test_gradients_of_what_stands_behind_the_residual_alone(trained: int) -> None:
    given = parts((2, 3, 19), affine="weight bias", vectors="sample", gate="sample", residual=True)
    tensor = given[trained]
    assert tensor is not None
    tensor.requires_grad_()
    check_gradients(NORM, given, options("layer"))
