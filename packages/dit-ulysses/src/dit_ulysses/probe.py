"""Measures the constants of the cost model on the ranks of a job.

All ranks measure at the same time, as they will work, and the result is the median over them: the same everywhere.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from dit_ulysses.agreement import agree
from dit_ulysses.costs import Costs
from dit_ulysses.errors import PlanError
from dit_ulysses.peers import Peers
from dit_ulysses.wire import Arriving, exchange

Watch = Callable[[str], None]

_TRIALS = 5  # of which the median counts
_LARGEST_BYTES = 1 << 28  # that a rank sends at once
_LARGEST_MATRIX, _LARGEST_SEQUENCE = 8192, 16384
_HEADS, _WIDTH = 4, 128


def measure(
    group: dist.ProcessGroup | None = None,
    *,
    seconds: float = 5.0,
    device: torch.device | None = None,
    watch: Watch | None = None,
) -> Costs:
    """Return the costs of the machine that these ranks run on; every rank of the group has to call this.

    Nodes are runs of ``LOCAL_WORLD_SIZE`` ranks, which torchrun sets; without it all ranks are taken for one node. What
    cannot be measured, as sending between nodes where there is one, stays a guess: see `Costs.measured`.

    Args:
        group: the ranks; the whole job when None.
        seconds: that it may take, roughly.
        device: that computes, and holds what is sent; that of the group when None. bf16 on an accelerator, fp32 on a
            CPU.
        watch: is told what is measured.

    Raises:
        PlanError: seconds is not above 0, or LOCAL_WORLD_SIZE is no number.
        GroupError: the group cannot be used by this process.
        DisagreementError: the ranks were called with different things.
        LostRankError: a rank was lost.
    """
    if not seconds > 0:
        raise PlanError(f"seconds is {seconds}; a number above 0 is expected")
    peers = Peers.of(group)
    node = _ranks_per_node(peers.size)
    agree(peers, {"function": "measure", "seconds": seconds, "LOCAL_WORLD_SIZE": node})
    probe = _Probe(peers, device or peers.device, seconds, watch or (lambda stage: None))
    found: dict[str, float | None] = {
        "matmul_flops": probe.pace("matrix products", probe.matmul, 128, _LARGEST_MATRIX, growth=8),
        "attention_flops": probe.pace("attention", probe.attention, 128, _LARGEST_SEQUENCE, growth=4),
    }
    for place, members in _neighbourhoods(peers, node).items():
        found |= probe.wire(place, members)
    known = {name: value for name, value in found.items() if value is not None}
    return Costs(**known, ranks_per_node=min(node, peers.size), measured=(*known, "ranks_per_node"))


@dataclass(frozen=True)
class _Probe:
    peers: Peers
    device: torch.device
    seconds: float
    watch: Watch

    def pace(
        self, what: str, make: Callable[[int], tuple[Callable[[], object], int]], size: int, largest: int, growth: int
    ) -> float:
        """Return the floating point operations per second of a rank, on the largest size for which there is time."""
        while True:
            self.watch(f"{what}, {size}")
            run, flops = make(size)
            once = self._median_time(run)
            if 2 * size > largest or once > self._limit(growth):
                pace = self._median_over_ranks(flops / once)
                assert pace is not None, "every rank computes"
                return pace
            size *= 2

    def matmul(self, size: int) -> tuple[Callable[[], object], int]:
        one, other = (self._tensor(size, size) for _ in range(2))
        return lambda: one @ other, 2 * size**3

    def attention(self, size: int) -> tuple[Callable[[], object], int]:
        q, k, v = (self._tensor(1, _HEADS, size, _WIDTH) for _ in range(3))
        return lambda: scaled_dot_product_attention(q, k, v), 4 * size**2 * _WIDTH * _HEADS

    def wire(self, place: str, members: Peers | None) -> dict[str, float | None]:
        """Return latency and bandwidth of exchanges among some ranks; None where no rank has any to send to."""
        latency, bandwidth, each = self._exchange_time(members, 1), None, 4096
        while latency is not None:
            self.watch(f"sending {place} nodes, {each:,} bytes to each")
            once = self._exchange_time(members, each)
            assert once is not None, "a rank that had someone to send to still has"
            others = 0 if members is None else members.size - 1
            pace = self._median_over_ranks(each * others / once if others else None)
            assert pace is not None, "a rank that had someone to send to still has"
            bandwidth = max(pace, bandwidth or 0.0)
            if once > self._limit(2) or 2 * each * max(1, self.peers.size - 1) > _LARGEST_BYTES:
                break
            each *= 2
        return {f"latency_{place}": latency, f"bandwidth_{place}": bandwidth}

    def _exchange_time(self, members: Peers | None, each: int) -> float | None:
        """Seconds of one exchange, the same on all ranks."""
        if members is None:
            return self._median_over_ranks(None)
        sent = torch.zeros(each * members.size, dtype=torch.uint8, device=self.device)

        def run() -> None:
            arriving = Arriving(members)
            exchange(sent, [each] * members.size, [each] * members.size, members, "probe", arriving)
            arriving.wait()

        return self._median_over_ranks(self._median_time(run))

    def _median_time(self, run: Callable[[], object]) -> float:
        times = []
        for _ in range(1 + _TRIALS):  # the first warms up
            start = time.perf_counter()
            run()
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return max(statistics.median(times[1:]), 1e-9)  # a clock may stand still

    def _median_over_ranks(self, mine: float | None) -> float | None:
        everyone: list[float | None] = [None] * self.peers.size
        dist.all_gather_object(everyone, mine, group=self.peers.group)
        return statistics.median(known) if (known := [each for each in everyone if each is not None]) else None

    def _limit(self, growth: int) -> float:
        """Seconds of one run after which the next size, so many times as dear, takes its share of the time."""
        return self.seconds / 4 / growth / (1 + _TRIALS)

    def _tensor(self, *shape: int) -> torch.Tensor:
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        return torch.randn(shape, dtype=dtype, device=self.device)


def _ranks_per_node(default: int) -> int:
    given = os.environ.get("LOCAL_WORLD_SIZE", str(default))
    if not given.isdecimal() or int(given) < 1:
        raise PlanError(f"LOCAL_WORLD_SIZE is {given!r}; a whole number from 1 on is expected, as torchrun sets it")
    return int(given)


def _neighbourhoods(peers: Peers, node: int) -> dict[str, Peers | None]:
    """The ranks of this node, and those at the same place of other nodes; None where this rank is alone."""
    me = peers.names[peers.rank]
    members = {
        "inside": [rank for rank in peers.names if rank // node == me // node],
        "between": [rank for rank in peers.names if rank % node == me % node],
    }
    return {place: _subgroup(peers, ranks) for place, ranks in members.items()}


def _subgroup(peers: Peers, ranks: list[int]) -> Peers | None:
    if len(ranks) == 1:
        return None
    if len(ranks) == peers.size:
        return peers
    return Peers.of(dist.new_group(ranks, use_local_synchronization=True))
