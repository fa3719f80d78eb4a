"""Sequence parallel attention on fake npu tensors, with the vendor's attention in it and a stand-in for hccl.

The stand-in moves nothing: torch's own "fake" backend, so that shapes, dtypes and devices of the whole path are
seen, on any number of ranks in one process. That the exchange moves the right numbers is shown on gloo, in dit-ulysses.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  # registers the device and the operators
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dit_fused_ops import attention_forward
from dit_ulysses import agreement, ring_attention, sequence_lengths, ulysses_attention

RANKS = 8
TOKENS = 37


@pytest.fixture(params=[0, RANKS - 1], ids=["first rank", "last rank"])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """This process as one rank of a job."""
    chosen: int = request.param
    dist.init_process_group("cpu:fake,npu:fake", store=FakeStore(), rank=chosen, world_size=RANKS)
    # What is agreed on are real bytes, and a fake tensor has none.
    with patch.object(agreement, "_everyone", lambda mine, lengths, peers: [mine] * peers.size):
        yield chosen
    dist.destroy_process_group()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The vendor's attention on an NPU, by dit-fused-ops."""
    out: Tensor = attention_forward(q, k, v, None, opt_mode="static")
    return out


@pytest.mark.parametrize("heads", [16, 12, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ulysses_goes_through_the_vendor_s_attention(rank: int, heads: int, dtype: torch.dtype) -> None:
    lengths = sequence_lengths(TOKENS, RANKS)
    seen: list[tuple[int, ...]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(tuple(q.shape))
        assert q.device.type == "npu"
        return attend(q, k, v)

    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.randn(2, lengths[rank], heads, 64, dtype=dtype, device="npu:0") for _ in range(3))
        out = ulysses_attention(q, k, v, group=None, attention=attention, lengths=lengths)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "npu")
    here = sequence_lengths(heads, RANKS)[rank]
    assert seen == ([(2, TOKENS, here, 64)] if here else [])


def test_the_ring_takes_the_way_that_every_device_can_go(rank: int) -> None:
    lengths = sequence_lengths(TOKENS, RANKS)
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.randn(2, lengths[rank], 5, 64, dtype=torch.bfloat16, device="npu:0") for _ in range(3))
        out = ring_attention(q, k, v, group=None, lengths=lengths)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "npu")
