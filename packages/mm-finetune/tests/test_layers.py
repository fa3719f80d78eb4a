"""Norm, gate and rotary embedding against their formulas; what attention refuses; the vision tower: transformers'."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity_reference import hf_config
from torch import Tensor

from mm_finetune.engine.layers import CoreAttention, MultimodalRotary, PackedRow, RMSNorm
from mm_finetune.engine.pictures import geometry
from mm_finetune.engine.pointwise import rms_norm, rotate, swiglu


def by_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_norm(dtype: torch.dtype, bound: float) -> None:
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=True), 32, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 32))
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = by_formula(x, norm.weight, 1e-3)
    assert norm(x).dtype == dtype
    assert (norm(x).double() - wanted).abs().max() <= bound * wanted.abs().max()
    assert norm.weight.sequence_parallel, "Megatron sums its gradient over tensor-parallel ranks"  # type: ignore[attr-defined]


def gate_by_formula(x: Tensor) -> Tensor:
    gate, value = x.double().chunk(2, -1)
    return gate / (1 + (-gate).exp()) * value


def turn_by_formula(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair (a, b) of the two halves as the complex number a + ib, turned by its angle."""
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


ANGLES = torch.linspace(0, 5, 21, dtype=torch.float64).view(7, 3)
TABLES = tuple(table.float().repeat(1, 2) for table in (ANGLES.cos(), ANGLES.sin()))
WRITTEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda x, w: rms_norm(x, w, 1e-3), lambda x, w: by_formula(x, w, 1e-3), ((5, 2, 32), (32,))),
    "gate": (swiglu, gate_by_formula, ((5, 2, 32),)),
    "rotary": (lambda x: rotate(x, *TABLES), lambda x: turn_by_formula(x, ANGLES), ((7, 2, 6),)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_values_and_gradients_are_those_of_the_formula(name: str) -> None:
    """Autograd of the formula in float64 is the truth."""
    run, formula, sizes = WRITTEN[name]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=generator, requires_grad=True) for size in sizes]
    exact = [each.detach().double().requires_grad_() for each in given]
    got, wanted = run(*given), formula(*exact)
    weight = torch.linspace(-1, 2, got.numel()).view_as(got)
    ours = torch.autograd.grad(got, given, weight)
    theirs = torch.autograd.grad(wanted, exact, weight.double())
    for one, other in zip([got, *ours], [wanted, *theirs], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_a_frozen_norm() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.linspace(-1, 2, 8)
    exact = x.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), x)
    (theirs,) = torch.autograd.grad(by_formula(exact, weight, 1e-6).square().sum(), exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_multimodal_rotary_is_that_of_transformers() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    text: Any = hf_config({"tied": False, "wide": False}).text_config
    positions = torch.randint(0, 90, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    theirs = Qwen2_5_VLRotaryEmbedding(text)(torch.zeros(1), positions)
    rope = text.rope_parameters
    width = text.hidden_size // text.num_attention_heads
    ours = MultimodalRotary(width, rope["rope_theta"], rope["mrope_section"])(positions)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_attention_takes_no_mask() -> None:
    heads: list[Any] = [torch.zeros(4, 1, 2, 8)] * 3
    with pytest.raises(ValueError, match="takes no mask"):
        CoreAttention()(*heads, torch.zeros(4, 4))


def test_megatron_takes_a_packed_row_for_an_ordinary_one() -> None:
    """Of ``thd`` it would make positions of its own."""
    assert PackedRow().qkv_format == "sbhd"


# With windows cut off at an edge, at both, and whole; frames of a video.
GRIDS = ([[1, 8, 8], [1, 4, 12]], [[1, 6, 10], [2, 4, 4], [3, 20, 18]])


@pytest.mark.parametrize("grids", GRIDS)
def test_patches_are_ordered_and_placed_as_by_transformers(grids: list[list[int]]) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

    vision: Any = hf_config({"tied": False, "wide": False}).vision_config
    grid, merge = torch.tensor(grids), vision.spatial_merge_size
    order, windows = get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
    width = vision.hidden_size // vision.num_heads
    ours = geometry(
        grids, merge=merge, window=vision.window_size // merge // vision.patch_size, head_dim=width, theta=10000.0,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert ours.order_M is not None
    assert torch.equal(ours.order_M, order)
    assert ours.windows.bounds == tuple(windows.tolist()) == tuple(ours.windows.cu_seqlens.tolist())
    assert ours.frames.bounds == tuple(get_vision_cu_seqlens(grid).tolist())
    assert torch.equal(ours.restored(ours.order_M), torch.arange(len(order)))
    tables = Qwen2_5_VLVisionRotaryEmbedding(vision)(torch.zeros(1), get_vision_position_ids(grid, merge))
    for got, table in zip(ours.rotary, tables, strict=True):
        torch.testing.assert_close(got, ours.ordered(table, merge), rtol=1e-6, atol=1e-6)


def test_without_windows_patches_stay_as_they_come() -> None:
    ours = geometry([[2, 4, 8]], merge=2, window=0, head_dim=16, theta=10000.0, device=torch.device("cpu"))
    patches = torch.arange(64)
    assert ours.ordered(patches, 2) is patches
    assert ours.frames.bounds == ours.windows.bounds == (0, 32, 64)
