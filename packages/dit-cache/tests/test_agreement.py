"""Ranks that share a generation decide alike; those of a static policy exchange nothing. One run of two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dit_cache.engine.gates import EasyCache, TeaCache
from dit_cache.engine.guards import Envelope, Limits
from dit_cache.engine.magnitude import MagCache
from dit_cache.engine.policies import Static
from dit_cache.engine.predictors import Offset
from dit_cache.engine.velocity import VelocityCache

RANKS = 2
STEPS = 16
PATIENCE = 120  # seconds, for processes that wait for each other in vain

Found = dict[str, dict[str, Any]]


def cases(group: dist.ProcessGroup) -> dict[str, VelocityCache]:
    # The change that is normal there: what one rank has is calm, what the other has is not.
    envelope = Envelope(bounds=dict.fromkeys(range(2, STEPS, 2), (0.0, 0.3)), extra=3)
    even = range(0, STEPS, 2)
    return {
        "easy": VelocityCache(EasyCache(0.3, first=3), predictor=Offset(), group=group),
        "easy alone": VelocityCache(EasyCache(0.3, first=3), predictor=Offset()),
        "tea": VelocityCache(TeaCache(0.3), group=group),
        "tea alone": VelocityCache(TeaCache(0.3)),
        "envelope": VelocityCache(Static(even), guards=[envelope], group=group),
        "envelope alone": VelocityCache(Static(even), guards=[envelope]),
        "static": VelocityCache(Static(even), predictor=Offset(), group=group),
        "magnitude": VelocityCache(MagCache([0.97] * STEPS, 0.12, 3), guards=[Limits(last=1)], group=group),
    }


def inputs(rank: int) -> list[Tensor]:
    """Little changes on rank 0, and much on rank 1."""
    generator = torch.Generator().manual_seed(rank)
    now, result = torch.randn(4, 8, generator=generator), []
    for _ in range(STEPS):
        now = now + (0.02, 0.5)[rank] * torch.randn(4, 8, generator=generator)
        result.append(now)
    return result


def run(cache: VelocityCache, rank: int, collectives: list[str]) -> dict[str, Any]:
    computed, sides = [], ("cond", "uncond")
    collectives.clear()
    with cache.generation(STEPS):
        for step, x in enumerate(inputs(rank)):
            for side in sides:

                def predict(step: int = step, side: str = side, x: Tensor = x) -> Tensor:
                    computed.append(f"{step} {side}")
                    return torch.tanh(x.roll(1, -1)) + x

                cache.velocity(predict, x, branch=side, signal=lambda x=x: x)  # type: ignore[misc]
    return {"computed": computed, "collectives": len(collectives)}


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return call


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    collectives: list[str] = []
    for name in ("broadcast", "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast_object_list", "barrier"):
        setattr(dist, name, counted(getattr(dist, name), collectives))
    group = dist.group.WORLD
    assert group is not None
    found = {name: run(cache, rank, collectives) for name, cache in cases(group).items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [each.communicate(timeout=PATIENCE)[0] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    assert [each.returncode for each in ranks] == [0] * RANKS, "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["easy", "tea", "envelope"])
def test_ranks_of_a_group_do_what_its_first_one_does(found: list[Found], name: str) -> None:
    first, second = found
    assert first[name]["computed"] == second[name]["computed"] == first[f"{name} alone"]["computed"]
    assert second[f"{name} alone"]["computed"] != first[f"{name} alone"]["computed"]
    assert len(first[name]["computed"]) < 2 * STEPS


@pytest.mark.parametrize(("name", "count"), [("easy", STEPS), ("tea", 2 * STEPS), ("envelope", 2 * STEPS)])
def test_one_number_is_exchanged_for_a_decision(found: list[Found], name: str, count: int) -> None:
    """EasyCache decides once for both sides of the guidance."""
    for rank in found:
        assert rank[name]["collectives"] == count
        assert rank[f"{name} alone"]["collectives"] == 0


@pytest.mark.parametrize("name", ["static", "magnitude"])
def test_what_looks_at_nothing_exchanges_nothing(found: list[Found], name: str) -> None:
    assert found[0][name] == found[1][name]
    assert found[0][name]["collectives"] == 0
    assert 2 < len(found[0][name]["computed"]) < 2 * STEPS


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
