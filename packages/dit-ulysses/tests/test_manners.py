"""What the other ranks see when one of them is wrong, or gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_all, run_ranks
from torch import Tensor

from dit_ulysses import (
    DisagreementError,
    GroupError,
    LostRankError,
    ShapeError,
    UlyssesError,
    cfg_parallel,
    gather_sequence,
    halo_exchange,
    split_sequence,
    ulysses_attention,
)
from dit_ulysses.agreement import agree
from dit_ulysses.lost import _job_store
from dit_ulysses.peers import Peers
from dit_ulysses.wire import Arriving, shift


def values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return q * k.mean() + v.mean()


def attend(group: Any = None, attention: Callable[..., Tensor] = values, **changed: Any) -> Any:
    shape = changed.pop("shape", (2, 3, 4, 8))
    q = torch.ones(shape, dtype=changed.pop("dtype", torch.float32), requires_grad=changed.pop("trained", False))
    return ulysses_attention(q, q, q, group=group, attention=attention, **changed)


# What the last rank of three does otherwise, and what all of them say.
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"shape": (1, 3, 4, 8)}, "batch: 2 on ranks 0 and 1, 1 on rank 2"),
    ({"shape": (2, 3, 2, 8)}, "heads: 4 on ranks 0 and 1, 2 on rank 2"),
    ({"shape": (2, 3, 4, 6)}, "channels of a head: 8 on ranks 0 and 1, 6 on rank 2"),
    ({"shape": (2, 5, 4, 8)}, "tokens, without lengths: 3 on ranks 0 and 1, 5 on rank 2"),
    ({"dtype": torch.bfloat16}, "dtype: torch.float32 on ranks 0 and 1, torch.bfloat16 on rank 2"),
    ({"layout": "BNSD", "shape": (2, 4, 3, 8)}, "layout: BSND on ranks 0 and 1, BNSD on rank 2"),
    ({"lengths": (3, 3, 3)}, "lengths: nothing on ranks 0 and 1, [3, 3, 3] on rank 2"),
    ({"chunks": 2}, "chunks: 1 on ranks 0 and 1, 2 on rank 2"),
    ({"trained": True}, "gradient of: [] on ranks 0 and 1, ['q', 'k', 'v'] on rank 2"),
    ({"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}, "mask: None on ranks 0 and 1, [1, 1, 9, 9] on rank 2"),
    ({"joint": (torch.ones(2, 1, 4, 8),) * 3}, "joint tokens: None on ranks 0 and 1, [1, 1, 1] on rank 2"),
]


def disagree() -> list[str]:
    said = []
    for changed, _ in CHANGES:
        group = dist.new_group()
        with pytest.raises(DisagreementError) as error:
            attend(group, **(changed if dist.get_rank() == 2 else {}))
        said.append(str(error.value))
        assert attend(group).shape == (2, 3, 4, 8)  # the group is as good as before
    return said


def test_ranks_that_disagree_all_say_what_and_who() -> None:
    for said in run_all(3, disagree):
        for found, (_, wanted) in zip(said, CHANGES, strict=True):
            assert wanted in found


def other_functions() -> list[str]:
    rank, x = dist.get_rank(), torch.ones(2, 3)
    said = []
    calls: list[Callable[[], Tensor]] = [
        lambda: gather_sequence(x, rank, group=None),
        lambda: gather_sequence(x[:, rank:], 1, group=None),
        lambda: gather_sequence(x.requires_grad_(rank == 1), 1, group=None, gradient="sum"),
        lambda: halo_exchange(x, 0, rank, 1, group=None),
        lambda: gather_sequence(x, 0, group=None) if rank else halo_exchange(x, 0, 1, 1, group=None),
    ]
    for call in calls:
        with pytest.raises(DisagreementError) as error:
            call()
        said.append(str(error.value))
    return said


def test_other_functions_find_out_as_well() -> None:
    for said in run_all(2, other_functions):
        for found, wanted in zip(
            said,
            [
                "dim: 0 on rank 0, 1 on rank 1",
                "tokens, without lengths: 3 on rank 0, 2 on rank 1",
                "gradient: None on rank 0, sum on rank 1",
                "before: 0 on rank 0, 1 on rank 1",
                "function: halo_exchange on rank 0, gather_sequence on rank 1",
            ],
            strict=True,
        ):
            assert wanted in found


def one_is_wrong() -> str:
    try:
        attend(lengths=(3, 3), shape=(2, 3 + dist.get_rank(), 4, 8))
    except UlyssesError as error:
        assert attend().shape == (2, 3, 4, 8)
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_bad_input_on_one_rank_is_told_to_the_others() -> None:
    other, own = run_all(2, one_is_wrong)
    assert own.startswith("ShapeError: lengths is [3, 3], and rank 1 of the group holds 4 tokens")
    assert other.startswith("DisagreementError")
    assert "bad input: nothing on rank 0, lengths is [3, 3], and rank 1" in other


def all_are_wrong() -> None:
    with pytest.raises(ShapeError, match="from 1 on"):
        attend(chunks=0)


def test_bad_input_on_all_ranks_is_the_same_error() -> None:
    run_all(3, all_are_wrong)


def small_groups() -> str:
    """Groups of some ranks: those outside are refused, those inside agree among themselves, named as the job does."""
    rank = dist.get_rank()
    outer, inner = dist.new_group([0, 3]), dist.new_group([1, 2])
    mine, others = (outer, inner) if rank in (0, 3) else (inner, outer)
    for call in (
        lambda: attend(others),
        lambda: split_sequence(torch.ones(4), 0, group=others),
        lambda: gather_sequence(torch.ones(4), 0, group=others),
        lambda: halo_exchange(torch.ones(4), 0, 1, 1, group=others),
    ):
        with pytest.raises(GroupError, match=f"rank {rank} is not in the group"):
            call()
    with pytest.raises(DisagreementError) as error:
        attend(mine, shape=(1 + rank, 3, 4, 8))
    assert attend(mine).shape == (2, 3, 4, 8)
    return str(error.value)


def test_groups_of_some_ranks() -> None:
    for rank, said in enumerate(run_all(4, small_groups)):
        assert ("1 on rank 0, 4 on rank 3" if rank in (0, 3) else "2 on rank 1, 3 on rank 2") in said


def begin_again() -> str:
    """A new process group has agreed on nothing yet, though its ranks are the same."""
    rank, store = dist.get_rank(), _job_store()
    agree(Peers.of(None), {"step": 1})
    agree(Peers.of(None), {"step": 2})
    dist.destroy_process_group()
    again = dist.PrefixStore("again", store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=again, rank=rank, world_size=2)
    with pytest.raises(DisagreementError) as error:
        agree(Peers.of(None), {"step": 1 + rank})
    return str(error.value)


def test_a_new_process_group_agrees_anew() -> None:
    for said in run_all(2, begin_again):
        assert "step: 1 on rank 0, 2 on rank 1" in said


def wrong_device() -> None:
    q = torch.ones(1, 3, 4, 8, device="meta")
    with pytest.raises(GroupError, match=r"on meta, and this group moves those on cpu \(cpu:gloo"):
        ulysses_attention(q, q, q, group=None, attention=values)
    with pytest.raises(GroupError, match="cpu, meta; one device"):
        ulysses_attention(q, torch.ones(1, 3, 4, 8), q, group=None, attention=values)


def test_tensors_that_the_group_does_not_move() -> None:
    run_all(2, wrong_device)


def test_without_a_process_group() -> None:
    with pytest.raises(GroupError, match="init_process_group first"):
        attend()


def dies_while_attending(lost: int, how: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if dist.get_rank() == lost:
            _go(how)
        return values(q, k, v)

    attend()
    attend(attention=attention)


def dies_before_it_agrees(lost: int, how: str) -> None:
    if dist.get_rank() == lost:
        _go(how)
    attend()


def dies_in_a_ring(lost: int, how: str) -> None:
    """Its neighbours wait for it, and the others for them."""
    peers = Peers.of(None)
    for step in range(peers.size):
        if dist.get_rank() == lost and step == 1:
            _go(how)
        arriving = Arriving(peers)
        shift(torch.ones(3), (3,), peers, "ring", arriving)
        arriving.wait()


def dies_in_another_group(lost: int, how: str) -> None:
    """Rank 0 waits for rank 2, that waits for rank 3: in groups that know nothing of each other."""
    limit = timedelta(seconds=HANGING)
    rows = [dist.new_group(ranks, timeout=limit) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks, timeout=limit) for ranks in ([0, 2], [1, 3])]
    rank = dist.get_rank()
    attend(rows[rank // 2])
    attend(columns[rank % 2])
    if rank == lost:
        _go(how)
    attend(rows[rank // 2])
    attend(columns[rank % 2])


def dies_while_predicting(lost: int, how: str) -> None:
    def predict() -> Tensor:
        _go(how)
        return torch.ones(2)

    cfg_parallel(lambda: torch.ones(2), predict, group=None)


def _go(how: str) -> None:
    if how == "exits":
        os._exit(1)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while not _job_store().check(["dit_ulysses/lost/lost"]):  # hangs, until the others have found out
        time.sleep(0.1)


HANGING = 8.0  # seconds that a process group waits for a rank that hangs, and to be made anew
LOSSES: list[tuple[Callable[..., None], int, int, str]] = [  # by ranks and the one that is lost
    (dies_while_attending, 4, 2, "exits"),
    (dies_while_attending, 3, 0, "is killed"),
    (dies_while_attending, 3, 1, "hangs"),
    (dies_before_it_agrees, 4, 3, "is killed"),
    (dies_in_a_ring, 4, 2, "exits"),
    (dies_in_a_ring, 5, 2, "hangs"),
    (dies_in_another_group, 4, 3, "exits"),
    (dies_in_another_group, 4, 3, "hangs"),
    (dies_while_predicting, 2, 1, "is killed"),
]


def test_a_rank_that_is_lost_is_named_by_all_others() -> None:
    """All at once, as they mostly wait."""
    with ThreadPoolExecutor(len(LOSSES)) as pool:
        started = [
            pool.submit(run_ranks, ranks, function, lost, how, limit=HANGING if how == "hangs" else 60.0)
            for function, ranks, lost, how in LOSSES
        ]
    for (function, _, lost, how), results in zip(LOSSES, started, strict=True):
        for rank, error in enumerate(results.result()):
            if rank == lost:
                continue
            at = f"{function.__name__}, {how}, rank {rank}: {error}"
            assert isinstance(error, LostRankError), at
            assert error.ranks == (lost,), at
            assert f"rank {lost} was lost while rank {rank} exchanged" in str(error), at
