"""A block of a diffusion transformer made of our ops, under everything that torch wraps around a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dit_fused_ops import (
    RMSNorm,
    attention_forward,
    dispatcher,
    layernorm_scale_shift,
    residual_gate_norm_scale_shift,
    rotary_position_embedding,
    swiglu,
)

HEADS, HEAD_DIM, WIDTH = 2, 8, 16
# Two orders of summation of the same float32 formulas, a few layers deep, numbers of a few units.
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
# Autocast's matrix products are bfloat16: one rounding in 2^8 each, some of them one after the other.
ROUNDED: dict[str, Any] = {"atol": 1e-1, "rtol": 5e-2}


class Block(nn.Module):
    """Modulated self-attention with rotary positions, then a gated feed-forward."""

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm_q, self.norm_k = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of x [B, S, 16], modulation [B, 5, 16] and tables [S, 4]."""
        scale, shift, gate, scale2, shift2 = modulation.unbind(1)
        normed = layernorm_scale_shift(self.norm1, x, scale, shift, self.fused)
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)) for part in self.qkv(normed).chunk(3, dim=-1))
        q, k = self.norm_q(q, self.fused), self.norm_k(k, self.fused)
        q = rotary_position_embedding(q, cos, sin, "rotated_interleaved", fused=self.fused)
        k = rotary_position_embedding(k, cos, sin, "rotated_interleaved", fused=self.fused)
        update = self.out(attention_forward(q, k, v, is_causal=True, fused=self.fused).flatten(2))
        x, normed = residual_gate_norm_scale_shift(self.norm2, x, update, gate, scale2, shift2, self.fused)
        output: Tensor = x + self.down(swiglu(self.up(normed)))
        return output


def block_and_inputs(*, fused: bool = True) -> tuple[Block, tuple[Tensor, ...]]:
    """The same weights and numbers each time."""
    torch.manual_seed(0)
    block = Block(fused=fused)
    angles = torch.randn(7, HEAD_DIM // 2)
    return block, (torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH), angles.cos(), angles.sin())


def reference() -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of the weights by the naive references, eagerly."""
    block, inputs = block_and_inputs(fused=False)
    output = block(*inputs)
    return output.detach(), list(torch.autograd.grad(output.square().sum(), list(block.parameters())))


def assert_like_the_reference(output: Tensor, gradients: list[Tensor]) -> None:
    wanted, slopes = reference()
    torch.testing.assert_close(output.detach(), wanted, **CLOSE)
    for got, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(got, slope, atol=1e-3, rtol=1e-4)  # sums of 14 squares of some units


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["static", "runtime"])
def test_eagerly(mode: str) -> None:
    dispatcher.configure(mode=mode)
    block, inputs = block_and_inputs()
    output = block(*inputs)
    assert_like_the_reference(output, list(torch.autograd.grad(output.square().sum(), list(block.parameters()))))


def test_compiled_in_one_graph() -> None:
    block, inputs = block_and_inputs()
    output = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
    assert_like_the_reference(output, list(torch.autograd.grad(output.square().sum(), list(block.parameters()))))


def test_exported() -> None:
    block, inputs = block_and_inputs()
    exported = torch.export.export(block, inputs).module()
    torch.testing.assert_close(exported(*inputs).detach(), reference()[0], **CLOSE)


def test_functional_gradients() -> None:
    block, inputs = block_and_inputs()
    weights: dict[str, Tensor] = dict(block.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(block, weights, inputs)
        return output.square().sum()

    gradients = torch.func.grad(loss)(weights)
    assert_like_the_reference(block(*inputs), [gradients[name] for name in weights])


def test_autocast() -> None:
    block, inputs = block_and_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(*inputs)
    torch.testing.assert_close(output.float().detach(), reference()[0], **ROUNDED)
    output.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.usefixtures("process_group")
def test_data_parallel() -> None:
    block, inputs = block_and_inputs()
    parallel = nn.parallel.DistributedDataParallel(block)
    output = parallel(*inputs)
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in block.parameters()]
    assert_like_the_reference(output, [gradient for gradient in gradients if gradient is not None])
