from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_all, run_ranks
from references import BF16, FP32, Case, errors
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dit_ulysses import DisagreementError, GroupError
from dit_ulysses.shares import shares
from dit_ulysses.usp import usp_attention

NAMES = ("ring", "ulysses")


def cases(ranks: int) -> list[Case]:
    odd = shares(3 * ranks + 1, ranks)
    ragged = (0, *range(1, ranks))[::-1]
    empty_row = (*(0,) * (ranks - 1), 5)
    return [
        Case(lengths=(3,) * ranks, heads=12),
        Case(lengths=odd, heads=5, layout="BNSD", scale=0.5),
        Case(lengths=shares(1, ranks), heads=1),
        Case(lengths=odd, heads=6, kv_heads=2, dtype=torch.bfloat16),
        *(
            Case(lengths=lengths, kv_lengths=kv_lengths, heads=heads, kv_heads=kv_heads, mask=mask, is_causal=is_causal)
            for lengths, kv_lengths in ((ragged, None), (empty_row, None), (empty_row, odd), (odd, empty_row))
            for heads, kv_heads, mask, is_causal in (
                (6, 2, None, True), (5, 5, "bool", False), (6, 2, "float", True), (12, 12, "padding", False)
            )
        ),
    ]  # fmt: skip


def compare(shape: tuple[int, int], of: list[Case]) -> list[list[float]]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=NAMES)
    found = []
    for case in of:
        q, k, v, grad = case.parts(dist.get_rank())
        q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
        out = usp_attention(q, k, v, mesh=mesh, **case.arguments())
        found.append(errors(case, dist.get_rank(), out.detach(), torch.autograd.grad(out, (q, k, v), grad)))
    return found


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_usp_is_attention_forward_and_backward(shape: tuple[int, int]) -> None:
    of = cases(shape[0] * shape[1])
    for rank, by_case in enumerate(run_all(shape[0] * shape[1], compare, shape, of)):
        for case, found in zip(of, by_case, strict=True):
            limit = BF16 if case.dtype == torch.bfloat16 else FP32
            assert max(found) < limit, f"{case}, rank {rank}: {found}"


def part_of_a_larger_mesh() -> bool:
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("cfg", *NAMES))
    x = torch.randn(1, 3, 2, 4)
    return usp_attention(x, x, x, mesh=mesh[NAMES]).shape == x.shape


def test_a_part_of_a_larger_mesh_will_do() -> None:
    assert all(run_all(4, part_of_a_larger_mesh))


def refused(what: str) -> None:
    x = torch.randn(1, 3 + (what == "lengths" and dist.get_rank() == 3), 2, 4)
    names = ("dp", "tp") if what == "names" else NAMES
    ranks = [[1, 0], [3, 2]] if what == "order" else [[0, 1], [2, 3]]
    mesh = None if what == "none" else DeviceMesh("cpu", ranks, mesh_dim_names=names)
    usp_attention(x, x, x, mesh=mesh)  # type: ignore[arg-type]  # that is what is tested


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("names", GroupError, "('dp', 'tp')"),
        ("none", GroupError, "mesh is a NoneType"),
        ("order", GroupError, "[[1, 0], [3, 2]]"),
        ("lengths", DisagreementError, "tokens, without lengths: 3 on rank"),
    ],
)
def test_bad_input_is_an_error_on_every_rank(what: str, kind: type[Exception], message: str) -> None:
    for error in run_ranks(4, refused, what):
        assert isinstance(error, kind), error
        assert message in str(error)
