from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import run_all, run_ranks
from torch import Tensor

from dit_ulysses import DisagreementError, GroupError, ShapeError, WireMeter, cfg_parallel


def predictions() -> tuple[list[list[float]], list[list[float]], list[str], int]:
    called = []

    def predict(name: str) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            called.append(name)
            return torch.randn(2, 3, generator=torch.Generator().manual_seed(len(name)))

        return compute

    with WireMeter() as meter:
        cond, uncond = cfg_parallel(predict("cond"), predict("uncond"), group=None)
    return cond.tolist(), uncond.tolist(), called, meter.total


@pytest.mark.parametrize("ranks", [1, 2])
def test_both_ranks_have_both_predictions(ranks: int) -> None:
    wanted = [
        torch.randn(2, 3, generator=torch.Generator().manual_seed(len(name))).tolist() for name in ("cond", "uncond")
    ]
    found = run_all(ranks, predictions)
    for cond, uncond, _, sent in found:
        assert cond == wanted[0]
        assert uncond == wanted[1]
        assert sent == (0 if ranks == 1 else 6 * 4)
    assert [called for _, _, called, _ in found] == ([["cond", "uncond"]] if ranks == 1 else [["cond"], ["uncond"]])


def gradient() -> list[float]:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    cond, uncond = cfg_parallel(lambda: weight**2, lambda: weight * 5, group=None)
    loss = ((uncond + 4 * (cond - uncond)) * torch.tensor([1.0, 10.0])).sum() / dist.get_world_size()
    (found,) = torch.autograd.grad(loss, weight)
    dist.all_reduce(found)
    return [float(value) for value in found]


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_all_ranks_add_up(ranks: int) -> None:
    for found in run_all(ranks, gradient):
        assert found == [4 * 2 * 2.0 - 15, 10 * (4 * 2 * 3.0 - 15)]


def differ(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cfg_parallel(lambda: torch.zeros(2), lambda: torch.zeros(shape, dtype=dtype), group=None)


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((3,), torch.float32, r"shape: \[2\] on rank 0, \[3\] on rank 1"),
        ((2,), torch.float64, "dtype: torch.float32 on"),
    ],
)
def test_predictions_that_do_not_fit(shape: tuple[int, ...], dtype: torch.dtype, said: str) -> None:
    for error in run_ranks(2, differ, shape, dtype):
        with pytest.raises(DisagreementError, match=said):
            raise error
    for error in run_ranks(1, differ, shape, dtype):
        with pytest.raises(ShapeError, match="one shape and dtype"):
            raise error


def one_raises() -> str:
    def fails() -> Tensor:
        raise ZeroDivisionError("no steps")

    cfg_parallel(lambda: torch.zeros(2), lambda: torch.zeros(2), group=None)
    try:
        cfg_parallel(lambda: torch.zeros(2), fails, group=None)
    except (ZeroDivisionError, DisagreementError) as error:
        cfg_parallel(lambda: torch.zeros(2), lambda: torch.zeros(2), group=None)  # the group is as good as before
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_rank_whose_function_raises_tells_the_other() -> None:
    other, own = run_all(2, one_raises)
    assert own == "ZeroDivisionError: no steps"
    assert other.startswith("DisagreementError")
    assert "raised: nothing on rank 0, ZeroDivisionError('no steps') on rank 1" in other


def three() -> None:
    cfg_parallel(lambda: torch.zeros(2), lambda: torch.zeros(2), group=None)


def test_a_group_of_three_is_refused() -> None:
    for error in run_ranks(3, three):
        with pytest.raises(GroupError, match="3 ranks; 1 or 2"):
            raise error
