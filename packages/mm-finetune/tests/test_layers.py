"""The norm against its formula; what attention refuses; the vision tower's attention against transformers' loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity_reference import hf_config
from torch import Tensor

from mm_finetune.engine.layers import NORMS, CoreAttention, PackedRow, RMSNorm
from mm_finetune.engine.vision import vision_tower


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


def test_norm_on_npu() -> None:
    """``npu_rms_norm(x, gamma, epsilon)`` gives the norm and the reciprocal root."""
    library = torch.library.Library("npu", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]

    def run(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
        root = (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
        return gamma * x * root, root

    library.impl("npu_rms_norm", run, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    x, weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 2, 8)
    ours = NORMS["npu"](x, weight, 1e-3)
    library._destroy()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.double(), by_formula(x, weight, 1e-3), rtol=1e-5, atol=1e-6)


def test_attention_takes_no_mask() -> None:
    heads: list[Any] = [torch.zeros(4, 1, 2, 8)] * 3
    with pytest.raises(ValueError, match="takes no mask"):
        CoreAttention()(*heads, torch.zeros(4, 4))


def test_megatron_takes_a_packed_row_for_an_ordinary_one() -> None:
    """Of ``thd`` it would make positions of its own."""
    assert PackedRow().qkv_format == "sbhd"


def test_vision_tower_equals_transformers() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = hf_config({"tied": False, "wide": False})
    theirs: Any = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config, dtype=torch.float32)
    ours: Any = vision_tower(config, SimpleNamespace(params_dtype=torch.float32, recompute_granularity=None))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    # Two micro-batches in a row: windows of the first must not be those of the second. The second grid has a part of
    # a window at each edge.
    for grids in ([[1, 8, 8], [1, 4, 12]], [[1, 6, 10], [2, 4, 4]]):
        grid = torch.tensor(grids)
        pixels = torch.randn(int(grid.prod(-1).sum()), 1176, generator=torch.Generator().manual_seed(0))
        wanted, got = (tower(pixels, grid_thw=grid).pooler_output for tower in (theirs, ours))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
