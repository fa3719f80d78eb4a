"""Rotation under torch's own machinery, and what it says to a wrong argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_fused_ops import rope
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.rope import rotary_position_embedding

MODES = ("rotated_half", "rotated_interleaved")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rotation(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        query, key = rotary_position_embedding(x, angles.cos(), angles.sin(), self.mode, key=x[:, :, :1])
        return query + key


X, ANGLES = random(2, 5, 3, 8), random(5, 4, seed=1)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_in_one_graph(mode: str) -> None:
    module = Rotation(mode)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, ANGLES), module(X, ANGLES))


@pytest.mark.parametrize("mode", MODES)
def test_exports_with_any_number_of_tokens(mode: str) -> None:
    module, tokens = Rotation(mode), torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(module, (X, ANGLES), dynamic_shapes=({1: tokens}, {0: tokens}))
    others = random(2, 9, 3, 8), random(9, 4, seed=1)
    torch.testing.assert_close(exported.module()(*others), module(*others))


@pytest.mark.parametrize("mode", MODES)
def test_under_torch_func(mode: str) -> None:
    module, leaves = Rotation(mode), (X.clone().requires_grad_(), ANGLES.clone().requires_grad_())
    wanted = torch.autograd.grad(module(*leaves).square().sum(), leaves)
    found = torch.func.grad(lambda x, angles: module(x, angles).square().sum(), argnums=(0, 1))(X, ANGLES)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    module, x = Rotation(MODES[0]), X.to(dtype)
    wanted = module(x, ANGLES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(x, ANGLES)
    assert got.dtype == dtype
    assert torch.equal(got, wanted)


def wrong_mode(mode: str) -> Any:
    table = torch.cat((ANGLES, ANGLES), -1) if mode == MODES[1] else ANGLES.repeat_interleave(2, -1)
    return rotary_position_embedding(X, table.cos(), table.sin(), mode)


rotated: Any = rope.rotary_position_embedding  # wrong types are given on purpose
COS = ANGLES.cos()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wrong_mode(MODES[0]), "laid out for 'rotated_interleaved', and rotated_mode is 'rotated_half': pass"),
        (lambda: wrong_mode(MODES[1]), "laid out for 'rotated_half', and rotated_mode is 'rotated_interleaved': pass"),
        (lambda: rotated([1.0], COS, COS), "x must be a Tensor, given list"),
        (lambda: rotated(X, None, COS), "cos must be a Tensor, given NoneType"),
        (lambda: rotated(X, COS, 1.0), "sin must be a Tensor, given float"),
        (
            lambda: rotated(X, COS, COS.int()),
            "sin must hold floating point .* torch.int32",
        ),
        (lambda: rotated(X, COS, COS, 1), "rotated_mode must be a str, given 1 of int"),
        (
            lambda: rotated(X, COS, COS, "half"),
            "Unsupported rotated_mode 'half', legal are",
        ),
        (lambda: rotated(X, COS, COS, MODES[0], 1), "head_first must be a bool, given 1"),
        (lambda: rotated(X, COS, COS, fused=None), "fused must be a bool, given None"),
        (lambda: rotated(X[0], COS, COS), r"x must be 4-D, given the shape \[5, 3, 8\]"),
        (
            lambda: rotated(X, COS[None], COS),
            r"cos must be 2-D or 4-D, given the shape \[1, 5, 4\]",
        ),
        (
            lambda: rotated(X, COS, COS[None, :, None]),
            r"alike, given \[5, 4\].*\[1, 5, 1, 4\]",
        ),
        (
            lambda: rotated(X, COS, COS.double()),
            "alike, given .* torch.float32 and .* torch.float64",
        ),
        (lambda: rotated(X, COS[:4], COS[:4]), "4 rows, x has 5 tokens"),
        (lambda: rotated(X, COS, COS, head_first=True), r"5 rows, x has 3 tokens \(BNSD"),
        (
            lambda: rotated(X, COS[:, None, None], COS[:, None, None]),
            r"do not broadcast to x",
        ),
        (
            lambda: rotated(X, COS[:, :3], COS[:, :3]),
            "3 wide; 8 .*a channel. or 4 .*one a pair",
        ),
        (lambda: rotated(X, COS[:, :2], COS[:, :2]), "say rotary_dim=2"),
        (lambda: rotated(X, COS, COS, rotary_dim=6), "4 wide; 6 .* or 3 "),
        (
            lambda: rotated(X, COS, COS, rotary_dim=7),
            "rotary_dim is 7, legal are even .* 8",
        ),
        (
            lambda: rotated(X, COS, COS, rotary_dim=10),
            "rotary_dim is 10, legal are even numbers",
        ),
        (lambda: rotated(random(1, 5, 2, 7), COS, COS), "rotary_dim is 7, legal are even"),
        (
            lambda: rotated(X, COS, COS, layout="BSH"),
            "layout is 'BSH', legal are BSND, BNSD, SBND",
        ),
        (lambda: rotated(X, COS.to("meta"), COS.to("meta")), "cos is on meta and x on cpu"),
        (lambda: rotated(X, COS, COS, key=random(2, 4, 1, 8)), "5 rows, x has 4 tokens"),
        (
            lambda: rotated(X, COS, COS, backend="flash"),
            "has no backend 'flash', legal are .*naive",
        ),
        (
            lambda: rotated(X, COS, COS, backend="triton"),
            "it runs on cuda, the tensors are on cpu",
        ),
        (lambda: rope.rope_tables_from_complex(COS), "complex frequencies are expected, given torch.float32"),
    ],
)
def test_wrong_arguments(call: Any, says: str) -> None:
    with pytest.raises(ParametersInvalid, match=says) as caught:
        call()
    assert isinstance(caught.value, ValueError)


def test_tables_of_the_other_mode_are_found_at_the_first_call_only_where_numbers_can_be_read() -> None:
    """A compiled graph cannot read them; it computes what the formula says."""
    table = ANGLES.repeat_interleave(2, -1)
    compiled: Any = torch.compile(rotary_position_embedding, fullgraph=True, backend="aot_eager")
    assert compiled(X, table.cos(), table.cos()).shape == X.shape
