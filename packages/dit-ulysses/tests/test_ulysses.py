from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_all
from torch import Tensor
from torch.nn import functional as F

from dit_ulysses import ShapeError, WireMeter, gather_sequence, split_sequence, ulysses_attention
from dit_ulysses.shares import shares

# A gradient of a key head is added up over query heads that other ranks had, so in another order than one process adds
# them: a few eps, 1.2e-7, of numbers of size 1 to 7. Where no key head is shared, nothing is added up, and all is equal
# to the bit.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 6e-2}


@dataclass(frozen=True, kw_only=True)
class Whole:
    """One attention as one process computes it."""

    tokens: int
    heads: int
    kv_heads: int | None = None
    keys: int | None = None
    joint: int = 0
    joint_at: Any = "front"
    layout: Any = "BSND"
    mask: str | None = None
    chunks: int = 1
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None  # as even as possible when None
    batch: int = 2
    width: int = 8

    def inputs(self) -> list[Tensor]:
        """q, k, v and three joint ones, in the layout."""
        generator = torch.Generator().manual_seed(self.tokens + self.heads)
        kv_heads, keys = self.kv_heads or self.heads, self.tokens if self.keys is None else self.keys
        sizes = [(rows, count) for rows in (self.tokens, self.joint) for count in (self.heads, kv_heads, kv_heads)]
        sizes = [(keys if at in (1, 2) else rows, count) for at, (rows, count) in enumerate(sizes)]
        found = []
        for rows, count in sizes:
            tensor = torch.randn(self.batch, rows, count, self.width, generator=generator, dtype=torch.float64)
            tensor = tensor if self.layout == "BSND" else tensor.transpose(1, 2).contiguous()
            found.append(tensor.to(self.dtype).requires_grad_())
        return found

    def masks(self) -> Tensor | None:
        if self.mask is None:
            return None
        heads, queries = {"heads": (self.heads, 1), "rows": (1, self.tokens + self.joint), "keys": (1, 1)}[self.mask]
        keys = (self.tokens if self.keys is None else self.keys) + self.joint
        kept = torch.rand(self.batch, heads, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.7
        kept[..., 0] = True
        return kept

    def weights(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(self.dtype)


def sdpa(layout: str) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) if layout == "BSND" else tensor for tensor in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2) if layout == "BSND" else out

    return attention


def one_process(case: Whole) -> list[Tensor]:
    """Output and gradients; the joint rows of the output first."""
    inputs, at = case.inputs(), case.layout.index("S")
    pairs = list(zip(inputs[3:], inputs[:3], strict=True))
    whole = [torch.cat(pair if case.joint_at == "front" else pair[::-1], at) for pair in pairs]
    mask = case.masks()
    out = sdpa(case.layout)(*whole, *(() if mask is None else (mask,)))
    parts = torch.tensor_split(out, [case.joint if case.joint_at == "front" else case.tokens], at)
    joint, spread = parts if case.joint_at == "front" else parts[::-1]
    loss = (spread * case.weights(spread)).sum() + (joint * case.weights(joint)).sum()
    return [joint.detach(), spread.detach(), *torch.autograd.grad(loss, inputs)]


def spread_out(case: Whole, attention: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The same by all ranks: whole tensors."""
    ranks, at = dist.get_world_size(), case.layout.index("S")
    inputs = case.inputs()
    lengths = case.lengths or shares(case.tokens, ranks)
    kv_lengths = None if case.keys is None else shares(case.keys, ranks)[::-1]
    q = split_sequence(inputs[0], at, group=None, lengths=lengths)
    k, v = (split_sequence(tensor, at, group=None, lengths=kv_lengths or lengths) for tensor in inputs[1:3])
    joint = (inputs[3], inputs[4], inputs[5]) if case.joint else None
    out = ulysses_attention(
        q, k, v, group=None, attention=attention or sdpa(case.layout), layout=case.layout, lengths=lengths,
        kv_lengths=kv_lengths, mask=case.masks(), joint=joint, joint_at=case.joint_at, chunks=case.chunks,
    )  # fmt: skip
    out, joint_out = out if case.joint else (out, inputs[3])
    spread = gather_sequence(out, at, group=None, lengths=lengths)
    loss = (spread * case.weights(spread)).sum()
    if case.joint:  # every rank has it, and the gradient is that of the sum over ranks
        loss = loss + (joint_out * case.weights(joint_out)).sum() / ranks
    gradients = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(inputs, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True)
    ]
    for gradient in gradients[3:]:
        summed = gradient.double().contiguous()
        dist.all_reduce(summed)
        gradient.copy_(summed)
    return [joint_out.detach(), spread.detach(), *gradients]


def compare(of: list[Whole]) -> list[tuple[bool, float]]:
    """For each case, whether the output is that of one process to the bit, and the largest error of all."""
    found = []
    for case in of:
        pairs = list(zip(spread_out(case), one_process(case), strict=True))
        assert all(ours.shape == theirs.shape and ours.dtype == theirs.dtype for ours, theirs in pairs), case
        error = max([0.0, *(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())])
        found.append((all(torch.equal(a, b) for a, b in pairs[:2]), error))
    return found


def cases(ranks: int) -> list[Whole]:
    ragged = tuple(0 if rank == ranks - 1 and rank else 2 * rank + 1 for rank in range(ranks))
    front = (sum(ragged), *[0] * (ranks - 1))
    return [
        *(Whole(tokens=4 * ranks + 3, heads=heads) for heads in (12, 10, 7, 5, 2, 1)),
        *(Whole(tokens=11, heads=heads, kv_heads=kv) for heads, kv in ((6, 2), (8, 2), (4, 1), (15, 5))),
        *(Whole(tokens=tokens, heads=4) for tokens in (1, 7, 8 * ranks)),
        Whole(tokens=7, heads=6, kv_heads=2, layout="BNSD", chunks=3),
        Whole(tokens=sum(ragged), heads=5, lengths=ragged),
        Whole(tokens=sum(ragged), heads=3, lengths=front, chunks=2),
        *(Whole(tokens=9, heads=7, joint=3, joint_at=at, chunks=2) for at in ("front", "rear")),
        *(Whole(tokens=9, heads=6, kv_heads=2, joint=1, joint_at=at, layout="BNSD") for at in ("front", "rear")),
        *(Whole(tokens=9, heads=5, keys=keys, chunks=2) for keys in (1, 4, 9, 13)),
        *(Whole(tokens=9, heads=5, mask=mask, chunks=2) for mask in ("heads", "rows", "keys")),
        Whole(tokens=9, heads=6, kv_heads=2, mask="heads", joint=2, joint_at="rear", keys=5, layout="BNSD"),
        *(Whole(tokens=9, heads=12, chunks=chunks) for chunks in (2, 3, 20)),
        *(Whole(tokens=9, heads=6, kv_heads=2, dtype=dtype) for dtype in (torch.bfloat16, torch.float64)),
        Whole(tokens=9, heads=5, dtype=torch.bfloat16, mask="rows", joint=2),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_output_is_that_of_one_process_to_the_bit_and_gradients_are_its(ranks: int) -> None:
    of = cases(ranks)[:: 2 if ranks in (3, 6) else 1]
    for rank, by_case in enumerate(run_all(ranks, compare, of)):
        for case, (equal, error) in zip(of, by_case, strict=True):
            assert equal, f"{case}, rank {rank}"  # torch's kernel works head by head, so it sees no other numbers
            assert error <= ROUNDING[case.dtype], f"{case}, rank {rank}: {error}"


@pytest.mark.parametrize("tokens", [4095, 4097])
def test_a_long_sequence(tokens: int) -> None:
    case = Whole(tokens=tokens, heads=3, batch=1, width=4)
    for ((equal, error),) in run_all(2, compare, [case]):
        assert equal
        assert error <= ROUNDING[torch.float32]


def count_heads(of: list[Whole]) -> list[tuple[int, int]]:
    """For each case, heads x tokens that the attention of this rank saw, and its calls."""
    found = []
    for case in of:
        seen: list[int] = []

        def attention(q: Tensor, k: Tensor, v: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(q.shape[1] * q.shape[2])
            return sdpa("BSND")(q, k, v)

        spread_out(case, attention)
        found.append((sum(seen), len(seen)))
    return found


@pytest.mark.parametrize("ranks", [3, 8])
def test_no_head_is_made_up_or_attended_twice(ranks: int) -> None:
    of = [Whole(tokens=9, heads=heads, chunks=chunks) for heads in (12, 5, 2) for chunks in (1, 2)]
    for case, by_rank in zip(of, zip(*run_all(ranks, count_heads, of), strict=True), strict=True):
        assert [seen for seen, _ in by_rank] == [heads * case.tokens for heads in shares(case.heads, ranks)]
        assert all(calls <= case.chunks and bool(calls) == bool(seen) for seen, calls in by_rank)


def out_of(case: Whole) -> list[float]:
    return [float(value) for value in spread_out(case)[1].flatten()]


def test_every_degree_gives_the_same_tensor() -> None:
    case = Whole(tokens=13, heads=6, kv_heads=2)
    outs = [out for ranks in (1, 2, 4, 8) for out in run_all(ranks, out_of, case)]
    assert all(out == outs[0] for out in outs)


def compiled() -> float:
    attention = torch.compile(sdpa("BSND"), backend="eager", fullgraph=True)
    case = Whole(tokens=9, heads=5)
    return max(float((a - b).abs().max()) for a, b in zip(spread_out(case, attention), one_process(case), strict=True)
               if a.numel())  # fmt: skip


def test_a_compiled_attention_is_taken() -> None:
    assert max(run_all(2, compiled)) <= ROUNDING[torch.float32]


def learned_mask() -> float:
    """The error of the gradient of a mask that is learned, on more ranks than heads."""
    case = Whole(tokens=5, heads=2)
    q, k, v, *_ = case.inputs()
    bias = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    out = sdpa("BSND")(q, k, v, bias)
    (wanted,) = torch.autograd.grad((out * case.weights(out)).sum(), bias)
    parts = [split_sequence(tensor.detach(), 1, group=None) for tensor in (q, k, v)]
    lengths = shares(5, dist.get_world_size())
    out = ulysses_attention(
        parts[0], parts[1], parts[2], group=None, attention=sdpa("BSND"), lengths=lengths, mask=bias
    )
    out = gather_sequence(out, 1, group=None, lengths=lengths)
    (found,) = torch.autograd.grad((out * case.weights(out)).sum(), bias, materialize_grads=True)
    found = found.contiguous()
    dist.all_reduce(found)
    return float((found - wanted).abs().max())


def test_the_gradient_of_a_learned_mask_adds_up_over_the_ranks() -> None:
    assert max(run_all(3, learned_mask)) <= ROUNDING[torch.float32]


def bad_calls() -> list[str]:
    q = torch.randn(1, 3, 4, 8)
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((q, q[:, :2], q), {}),
        ((q, q, q[:, :2]), {}),
        ((q, q[:, :, :3], q[:, :, :3]), {}),
        ((q, q.double(), q), {}),
        ((q[0], q, q), {}),
        ((q, q, q), {"layout": "SBND"}),
        ((q, q, q), {"lengths": [3, 3]}),
        ((q, q, q), {"lengths": [4]}),
        ((q, q[:, :2], q[:, :2]), {"lengths": [3]}),
        ((q, q, q), {"chunks": 0}),
        ((q, q, q), {"joint": (q, q, q), "joint_at": "middle"}),
        ((q, q, q), {"joint": (q[..., :4], q[..., :4], q[..., :4])}),
        ((q, q, q), {"mask": torch.ones(3, 3, dtype=torch.bool)}),
        ((q, q, q), {"mask": torch.ones(1, 1, 3, 2, dtype=torch.bool)}),
        ((q, q, q), {"attention": lambda q, k, v: q[:, :1]}),
    ]
    said = []
    for (a, b, c), options in calls:
        with pytest.raises(ShapeError) as error:
            ulysses_attention(a, b, c, **{"group": None, "attention": sdpa("BSND"), **options})
        said.append(str(error.value))
    return said


def test_bad_input_is_told() -> None:
    said = run_all(1, bad_calls)[0]
    for found, wanted in zip(
        said,
        [
            "same shape", "same shape", "divide", "float64", "4 dimensions", "there are BSND, BNSD", "for each rank",
            "holds 3 tokens", "give kv_lengths", "from 1 on", '"front" or "rear"', "only the number of tokens",
            "all tokens of all ranks", "all tokens of all ranks", "the same shape is expected",
        ],
        strict=True,
    ):  # fmt: skip
        assert wanted in found


def nothing_else_is_sent() -> dict[str, int]:
    case = Whole(tokens=8, heads=4)
    with WireMeter() as meter:
        spread_out(case)
    return meter.calls


def test_queries_keys_and_values_go_in_one_exchange() -> None:
    for calls in run_all(2, nothing_else_is_sent):
        assert calls["tokens to heads"] == calls["attention to tokens"] == 1
