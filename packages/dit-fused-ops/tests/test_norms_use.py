"""Norms under torch's own machinery, and what they say to a wrong argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_fused_ops import norms
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.norms import (
    RMSNorm,
    fast_layernorm,
    layernorm_scale_shift,
    residual_gate_norm_scale_shift,
    rmsnorm_scale_shift,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Everything between attention and feed-forward of a DiT block."""

    def __init__(self) -> None:
        super().__init__()
        self.query_norm = RMSNorm(8)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor, y: Tensor, vectors: Tensor) -> Tensor:
        gate, scale, shift = vectors.chunk(3, dim=1)
        residual, normed = residual_gate_norm_scale_shift(self.norm, x, self.query_norm(y), gate, scale, shift)
        normed = normed + rmsnorm_scale_shift(self.query_norm, x, scale, shift)
        return layernorm_scale_shift(self.norm, residual + normed, scale, shift) + fast_layernorm(self.norm, x)


def given() -> tuple[Tensor, Tensor, Tensor]:
    return random(2, 5, 8), random(2, 5, 8, seed=1), random(2, 3, 8, seed=2)


def test_compiles_in_one_graph() -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given()), block(*given()))


def test_exports() -> None:
    block = Block()
    exported = torch.export.export(block, given())
    torch.testing.assert_close(exported.module()(*given()), block(*given()))


def test_exports_with_any_number_of_tokens_and_samples() -> None:
    block = Block()
    samples, tokens = torch.export.Dim("samples", min=2, max=64), torch.export.Dim("tokens", min=2, max=64)
    free: Any = ({0: samples, 1: tokens}, {0: samples, 1: tokens}, {0: samples})
    exported = torch.export.export(block, given(), dynamic_shapes=free)
    others = (random(3, 7, 8), random(3, 7, 8, seed=1), random(3, 3, 8, seed=2))
    torch.testing.assert_close(exported.module()(*others), block(*others))


def test_under_torch_func() -> None:
    block, tensors = Block(), given()
    wanted = torch.autograd.grad(block(tensors[0].requires_grad_(), *tensors[1:]).sum(), tensors[0])[0]
    found = torch.func.grad(lambda x: block(x, *tensors[1:]).sum())(tensors[0].detach())
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    block, tensors = Block(), tuple(tensor.to(dtype) for tensor in given())
    wanted = block(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = block(*tensors)
    assert got.dtype == dtype
    assert torch.equal(got, wanted)


def test_gradients_reach_the_weights() -> None:
    block = Block()
    block(*given()).sum().backward()
    weight = block.query_norm.weight
    assert weight.grad is not None
    assert weight.grad.abs().min() > 0


# Wrong types are given on purpose.
rms_norm: Any = norms.rms_norm
layer_norm: Any = norms.fast_layernorm
modulated: Any = norms.layernorm_scale_shift
modulated_rms: Any = norms.rmsnorm_scale_shift
gated: Any = norms.residual_gate_norm_scale_shift
LAYER, RMS = nn.LayerNorm(8), RMSNorm(8)
X, V = random(2, 5, 8), random(2, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: RMS(random(8)),
            r"should be greater than 1 and less than 9\. Given the shape \[8\]",
        ),
        (lambda: RMS(random(*[1] * 8, 8)), "The input dimension should be greater than 1 and less than 9"),
        (lambda: RMS([1.0]), "x must be a Tensor, given list"),
        (lambda: RMS(torch.ones(2, 8, dtype=torch.int64)), "x must hold floating point numbers, given torch.int64"),
        (lambda: RMS(random(2, 9)), r"weight is \[8\], and the last dimension of x \[2, 9\] wants \[9\]"),
        (lambda: RMS(X, if_fused=1), "fused must be a bool, given 1 of int"),
        (lambda: rms_norm(X, "ones"), "weight must be a Tensor, given str"),
        (lambda: layer_norm(RMS, X), "norm must be a LayerNorm"),
        (lambda: layer_norm(LAYER, None), "x must be a Tensor, given NoneType"),
        (lambda: layer_norm(LAYER, random(2, 9)), r"x \[2, 9\] must be the normalized_shape \[8\]"),
        (
            lambda: layer_norm(nn.LayerNorm((5, 8)), random(8)),
            r"x \[8\] must be the normalized_shape \[5, 8\]",
        ),
        (lambda: layer_norm(LAYER, X, 3), r"Expected impl_mode to be in \[0, 1, 2\], given 3"),
        (lambda: layer_norm(LAYER, X, True), r"Expected impl_mode to be in \[0, 1, 2\], given True"),
        (
            lambda: layer_norm(LAYER, X, 2),
            "only support all input dtype float16! Given torch.float32.*impl_mode 0",
        ),
        (lambda: layer_norm(LAYER, X.half(), 2), "only support all input dtype float16!.*float32"),
        (lambda: modulated(RMS, X, V, V), "layernorm must be a LayerNorm"),
        (lambda: modulated(LAYER, X, None, V), "scale and shift must be Tensors, given None; a norm without"),
        (lambda: modulated(LAYER, X, V, 1.0), "shift must be a Tensor, given float"),
        (lambda: modulated(LAYER, X[0], V, V), r"x must be 3-D, given the shape \[5, 8\]"),
        (lambda: modulated(LAYER, X, V[0], V), r"scale must be 2-D or 3-D, given the shape \[8\]"),
        (
            lambda: modulated(LAYER, X, V, random(3, 8)),
            r"shift is \[3, 8\].*\[2, 1, 8\] or \[2, 5, 8\]",
        ),
        (
            lambda: modulated(LAYER, X, random(2, 4, 8), V),
            r"scale is \[2, 4, 8\].*the first size may be 1",
        ),
        (lambda: modulated(LAYER, X, random(2, 9), V), r"scale is \[2, 9\]"),
        (lambda: modulated(nn.LayerNorm(9), X, V, V), r"norm is over \[9\].*x \[2, 5, 8\]"),
        (lambda: modulated(LAYER, X, V, V, fused="yes"), "fused must be a bool, given 'yes'"),
        (lambda: modulated(LAYER, X, V, V.to("meta")), "shift is on meta and x on cpu; move them"),
        (
            lambda: modulated(LAYER, X, V[:1], V, legacy=True),
            r"scale is \[1, 8\]; x \[2, 5, 8\] wants",
        ),
        (
            lambda: modulated(LAYER, X, V, V, backend="best"),
            "no backend 'best', legal are .*eager",
        ),
        (
            lambda: modulated(LAYER, X, V, V, backend="triton"),
            "it runs on cuda.*can: .*eager",
        ),
        (
            lambda: modulated_rms(LAYER, X, V, V),
            "norm must be an RMSNorm.*given LayerNorm",
        ),
        (
            lambda: gated(nn.Identity(), X, X),
            "a LayerNorm or an RMSNorm, given Identity",
        ),
        (lambda: gated(LAYER, X, None), "y must be a Tensor, given None; a norm without"),
        (
            lambda: gated(LAYER, X, X[:1]),
            r"one shape, given \[2, 5, 8\] and \[1, 5, 8\]",
        ),
        (lambda: gated(LAYER, X, X, V[0]), "gate must be 2-D or 3-D"),
        (
            lambda: gated(LAYER, X, X, None, V),
            "scale and shift go together: pass both",
        ),
        (lambda: gated(nn.BatchNorm1d(8), X, X), "given BatchNorm1d"),
    ],
)
def test_wrong_arguments(call: Any, says: str) -> None:
    with pytest.raises(ParametersInvalid, match=says) as caught:
        call()
    assert str(caught.value).startswith("[MIE06E000001] Parameters invalid. ")
    assert isinstance(caught.value, ValueError)


def test_one_vector_for_all_samples_is_legal_unless_legacy() -> None:
    shared = layernorm_scale_shift(LAYER, X, V[:1], V[:1, None])
    torch.testing.assert_close(
        shared, layernorm_scale_shift(LAYER, X, V[:1].expand(2, 8), V[:1].expand(2, 8), legacy=True)
    )
