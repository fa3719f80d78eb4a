from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_all, run_ranks
from references import BF16, FP32, Case, errors, naive_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_ulysses import DisagreementError, ShapeError, WireMeter, blocks
from dit_ulysses.blocks import FLASH_CPU, FLASH_CUDA, MATH, Block, kernel_for, merge
from dit_ulysses.ring import ring_attention
from dit_ulysses.shares import shares
from dit_ulysses.wire import Arriving, shift


def cases(ranks: int) -> list[Case]:
    odd = shares(4 * ranks + 3, ranks)
    ragged = (0, *(2 * rank + 1 for rank in range(1, ranks)))[::-1] if ranks > 1 else (5,)
    other = tuple(7 - 3 * (rank % 3) for rank in range(ranks))
    some = [
        Case(lengths=(5,) * ranks, heads=12),
        Case(lengths=odd, heads=5, layout="BNSD", scale=0.5),
        Case(lengths=ragged, heads=6, kv_heads=2),
        Case(lengths=shares(1, ranks), width=5),
        Case(lengths=ragged, kv_lengths=other, heads=6, kv_heads=2),
        *(
            Case(lengths=lengths, kv_lengths=kv_lengths, heads=6, kv_heads=2, mask=mask, is_causal=is_causal)
            for lengths, kv_lengths in ((odd, None), (ragged, other))
            for mask in (None, "padding", "bool", "float", "row")
            for is_causal in (False, True)
        ),
    ]
    half = [replace(case, dtype=torch.bfloat16) for case in some[:4] + some[-10:-6]]
    return some + half


def compare(of: list[Case]) -> list[list[float]]:
    found = []
    for case in of:
        q, k, v, grad = case.parts(dist.get_rank())
        q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
        out = ring_attention(q, k, v, group=None, **case.arguments())
        found.append(errors(case, dist.get_rank(), out.detach(), torch.autograd.grad(out, (q, k, v), grad)))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ring_is_attention_forward_and_backward(ranks: int) -> None:
    of = cases(ranks)
    for rank, by_case in enumerate(run_all(ranks, compare, of)):
        for case, found in zip(of, by_case, strict=True):
            limit = BF16 if case.dtype == torch.bfloat16 else FP32
            assert max(found) < limit, f"{case}, rank {rank}: {found}"  # NaN fails as well


@pytest.mark.parametrize("tokens", [4095, 4097])
def test_a_long_sequence(tokens: int) -> None:
    case = Case(lengths=shares(tokens, 2), heads=1, width=4, batch=1)
    for (found,) in run_all(2, compare, [case]):
        assert max(found) < FP32


def wire(case: Case) -> tuple[dict[str, int], int]:
    q, k, v, grad = case.parts(dist.get_rank())
    with WireMeter() as meter:
        q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
        out = ring_attention(q, k, v, group=None, lengths=case.lengths)
        forward = meter.total
        torch.autograd.grad(out, (q, k, v), grad)
    return meter.sent, forward


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "dtype"), [(2, 6, torch.float32), (4, 2, torch.bfloat16), (8, 6, torch.bfloat16)]
)
def test_bytes_are_those_of_the_formula(ranks: int, kv_heads: int, dtype: torch.dtype) -> None:
    # 2 · (S/P) · C · (P - 1) · b for keys and values, C of the key heads, in each direction; gradients home in fp32.
    case = Case(lengths=(3,) * ranks, heads=6, kv_heads=kv_heads, batch=1, dtype=dtype)
    elements = 2 * 3 * kv_heads * case.width * (ranks - 1)
    for sent, forward in run_all(ranks, wire, case):
        assert forward == elements * dtype.itemsize
        assert sent == {
            "ring": elements * dtype.itemsize,
            "ring, backward": elements * dtype.itemsize,
            "ring, gradients home": elements * 4,
        }


def test_uneven_shards_send_no_more_than_there_is() -> None:
    case = Case(lengths=(4, 0, 3), heads=6, batch=1)
    for rank, (_, forward) in enumerate(run_all(3, wire, case)):
        # every block but the next rank's passes through
        assert forward == 2 * (7 - case.lengths[(rank + 1) % 3]) * 6 * case.width * 4


def order() -> list[str]:
    seen: list[str] = []

    def started(*arguments: Any) -> Tensor:
        seen.append("start")
        return shift(*arguments)

    class Watched(Arriving):
        def wait(self) -> None:
            seen.append("wait")
            super().wait()

    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> blocks.Outputs:
        seen.append("compute")
        return MATH.forward(q, k, v, block)

    x = torch.randn(1, 3, 2, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_ulysses.ring.shift", started)
        patch.setattr("dit_ulysses.ring.Arriving", Watched)
        ring_attention(x, x, x, group=None, kernel=replace(MATH, forward=forward))
    return seen


def test_the_next_block_is_on_its_way_while_one_is_computed() -> None:
    for seen in run_all(3, order):
        assert seen == ["start", "compute", "wait"] * 2 + ["compute", "wait"]


def computed() -> int:
    seen: list[Block] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> blocks.Outputs:
        seen.append(block)
        return MATH.forward(q, k, v, block)

    x = torch.randn(1, 3, 2, 4)
    ring_attention(x, x, x, group=None, is_causal=True, kernel=replace(MATH, forward=forward))
    return len(seen)


def test_hidden_blocks_are_not_computed() -> None:
    assert run_all(4, computed) == [1, 2, 3, 4]


def without_lengths() -> None:
    x = torch.randn(1, 3 + dist.get_rank() // 2, 2, 4)
    ring_attention(x, x, x, group=None)


def test_unequal_shards_without_lengths_are_an_error_on_every_rank() -> None:
    for error in run_ranks(3, without_lengths):
        assert isinstance(error, DisagreementError)
        assert "tokens, without lengths: 3 on ranks 0 and 1, 4 on rank 2" in str(error)


def refused(what: str) -> None:
    x = torch.randn(1, 3, 2, 4)
    mask = torch.zeros(1, 1, 6, 6, requires_grad=what == "gradient")
    lengths, kv_lengths = (None, None) if what != "keys" else ((3, 3), None)
    mask = mask[:, :, :3] if what == "local" else mask
    key = torch.randn(1, 2, 2, 4) if what == "keys" else x
    ring_attention(x, key, key, group=None, mask=mask, lengths=lengths, kv_lengths=kv_lengths)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("local", r"mask is \[1, 1, 3, 6\].* \[1, 2, 6, 6\]"),
        ("gradient", r"requires a gradient.*detach"),
        ("keys", r"keys have 2 tokens here and queries 3; give kv_lengths"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(what: str, message: str) -> None:
    for error in run_ranks(2, refused, what):
        assert isinstance(error, ShapeError)
        assert re.search(message, str(error))


BLOCKS = [Block(scale=0.4), Block(scale=0.4, diagonal=0)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sizes", [(4, 4, 7, 5), (6, 2, 5, 7), (3, 3, 1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_kernels_of_the_cpu_are_one(
    block: Block, sizes: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_SCORES", 50)  # several chunks
    heads, kv_heads, queries, keys = sizes
    q, grad = torch.randn(2, 2, heads, queries, 8, dtype=dtype)
    k, v = torch.randn(2, 2, kv_heads, keys, 8, dtype=dtype)
    assert kernel_for(q, k, block) is FLASH_CPU
    results = []
    for kernel in (MATH, FLASH_CPU):
        out, lse = kernel.forward(q, k, v, block)
        results.append((out, lse, *kernel.backward(grad, q, k, v, out, lse, block)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=FP32, rtol=0)


def test_masks_and_crossed_blocks_are_for_the_math_kernel() -> None:
    x = torch.randn(1, 2, 3, 4)
    for block in (Block(scale=1.0, diagonal=1), Block(scale=1.0, mask=torch.ones(1, 1, 3, 3))):
        assert kernel_for(x, x, block) is MATH


def test_merged_blocks_are_the_whole() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    for start in (0, 3, 6):
        lse = merge(
            out, lse, *MATH.forward(q, k[:, :, start : start + 3], v[:, :, start : start + 3], Block(scale=0.5))
        )
    torch.testing.assert_close(out, naive_attention(q, k, v), atol=FP32, rtol=0)


def test_torch_takes_the_arguments_of_the_cuda_kernel() -> None:
    with FakeTensorMode():
        q, out, grad = torch.empty(3, 2, 6, 5, 16, dtype=torch.bfloat16, device="cuda")
        k, v = torch.empty(2, 2, 6, 5, 16, dtype=torch.bfloat16, device="cuda")
        out, lse = FLASH_CUDA.forward(q, k, v, BLOCKS[1])
        gradients = FLASH_CUDA.backward(grad, q, k, v, out, lse, BLOCKS[1])
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]
