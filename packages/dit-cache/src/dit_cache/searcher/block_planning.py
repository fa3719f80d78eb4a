"""What it would cost to use again what blocks did at an earlier step, seen in one uncached generation.

At every step, branch and block, values of the residual stream at a few random positions are recorded: a *sketch*. The
squared norm of a difference of sketches, times elements over positions, estimates that of the whole tensors without
bias. One sketch before and one after each block say how far the change over any range of blocks at one step is from
that at another::

    e(s, r, a, b) = ‖ (after_{b−1} − before_a)(s) − (after_{b−1} − before_a)(r) ‖²

Letters: T steps, L blocks, R ranges, K positions of all streams together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_cache.engine.blocks import BlockCache
from dit_cache.engine.finding import find_attention, find_blocks
from dit_cache.engine.policies import Always
from dit_cache.engine.regions import Output, Place, Stretch
from dit_cache.engine.watched import Call, Watched

_SEED = 0  # of the positions: two searches look at the same ones


class BlockRecorder(BlockCache):
    """Computes everything, and keeps sketches of what the blocks did.

    Args:
        model: is watched, until `detach`.
        attention: whether outputs of the attentions are recorded, or the stream before and after each block.
        blocks: path of the list of blocks; found when None.
        module: name of the attention in a block; found when None.
        branches: in the order in which the model is called for them in each step.
        positions: of one tensor; all where it has no more elements.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attention: bool,
        blocks: str | None,
        module: str | None,
        branches: Sequence[str],
        positions: int,
    ) -> None:
        found = find_blocks(model, blocks)
        if attention:
            places: list[Place] = [Output(str(n), inside) for n, inside in enumerate(find_attention(found, module))]
        else:
            places = [_Both(str(n), found, (n, n + 1)) for n in range(len(found))]
        self._whole = attention
        self._positions = positions
        self._chosen: dict[int, Tensor] = {}
        self._sketches: dict[tuple[str, int], list[Tensor]] = {}
        super().__init__([Watched(model, places)], Always(), branches=branches)

    def ranges(self) -> list[tuple[int, int]]:
        """Return what may be cached, [R]: every range of blocks; with attentions all blocks or nothing."""
        length = len(self._watched[0].places)
        if self._whole:
            return [(0, length)]
        return [(start, end) for start in range(length) for end in range(start + 1, length + 1)]

    def errors(self, reach: int) -> Tensor:
        """Return the error of using again at step s what was computed n steps before, float64 [reach + 1, T, R].

        It is summed over branches and over the samples of the batch; 0 where s < n.
        """
        steps = 1 + max(step for _, step in self._sketches)
        total = torch.zeros(reach + 1, steps, len(self.ranges()), dtype=torch.float64)
        for branch in self.branches:
            recorded = torch.stack([torch.stack(self._sketches[branch, step]) for step in range(steps)]).double()
            for back in range(1, min(reach, steps - 1) + 1):
                total[back, back:] += self._changes(recorded[back:] - recorded[:-back])
        return total

    def _changes(self, difference: Tensor) -> Tensor:
        """Squared norms of differences between two steps, [T, L, 2, K] → [T, R]; [T, L, 1, K] for attentions."""
        if self._whole:
            return difference.square().sum((1, 2, 3))[:, None]
        start, end = torch.tensor(self.ranges()).T
        before, after = difference.unbind(2)
        # Not by inner products: neighbouring blocks differ by little, and the rest would cancel.
        apart = torch.cdist(before, after, compute_mode="donot_use_mm_for_euclid_dist")
        return apart.square()[:, start, end - 1]

    def _open(self, sigmas: Sequence[float] | int) -> None:
        super()._open(sigmas)
        self._sketches.clear()

    def _keep(self, call: Call, place: Place) -> None:
        value, place.value = place.value, None
        if value is not None:
            sketched = [self._sketch(tensor) for tensor in value]
            rows = 1 if self._whole else 2
            self._sketches.setdefault((call.at.branch, call.at.step), []).append(torch.cat(sketched).view(rows, -1))

    def _sketch(self, tensor: Tensor) -> Tensor:
        """Values at the chosen positions, scaled to the norm of the whole, float32 [K] on the CPU."""
        flat = tensor.reshape(-1)
        positions = self._chosen.get(flat.numel())
        if positions is None:
            positions = self._chosen[flat.numel()] = self._draw(flat.numel()).to(flat.device)
        return flat[positions].float().cpu() * math.sqrt(flat.numel() / len(positions))

    def _draw(self, elements: int) -> Tensor:
        if elements <= self._positions:
            return torch.arange(elements)
        # With replacement: a permutation of all elements of a long video would be larger than the video.
        return torch.randint(elements, (self._positions,), generator=torch.Generator().manual_seed(_SEED))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration in the model of the search.

    Attributes:
        start, interval, end: as those of `Interval`; the end is a hole.
        between: blocks.
        error: predicted.
        executed: share of the calls.
    """

    start: int
    interval: int
    end: int
    between: tuple[int, int]
    error: float
    executed: float


def plans(errors: Tensor, ranges: Sequence[tuple[int, int]], speedup: float, *, count: int) -> list[Plan]:
    """Return `count` plans that reach the speed-up, the most promising first; fewer if there are fewer.

    The error grows with every hole: of a start, an interval and a range, only the least end that reaches it counts.
    Errors compare well within a range; between ranges, they do not say what later blocks make of them. So the best of
    every range comes before the second best of any.

    Args:
        errors: [reach + 1, T, R], see `BlockRecorder.errors`.
        ranges: of blocks, [R], all blocks among them.
        speedup: calls over those that are executed, at least.
        count: how many.
    """
    steps, lengths = errors.shape[1], torch.tensor([end - start for start, end in ranges])
    calls = steps * int(lengths.max())
    allowed = calls / speedup + 1e-9
    grids = [(start, interval) for interval in range(2, len(errors) + 1) for start in range(steps - 1)]
    costs = torch.full((len(grids), len(ranges)), math.inf, dtype=torch.float64)
    ends, executed = (torch.zeros(costs.shape, dtype=torch.int64) for _ in range(2))
    for row, (start, interval) in enumerate(grids):
        at = torch.arange(start, steps)
        back = (at - start) % interval
        left = calls - (back > 0).cumsum(0)[:, None] * lengths
        first = (left > allowed).sum(0)  # of the steps from the start on, the first after whose hole it is reached
        index = first.clamp(max=len(at) - 1)[None]
        total = errors[back, at].cumsum(0).gather(0, index)[0]
        # A last interval that is not filled is a shorter one, with the same holes.
        costs[row] = torch.where((interval - 1 <= first) & (first < len(at)), total, math.inf)
        ends[row], executed[row] = start + first, left.gather(0, index)[0]
    ranked, rows = (each[:count] for each in costs.sort(dim=0, stable=True))
    places = [(rank, float(ranked[rank, place]), place) for rank, place in ranked.isfinite().nonzero().tolist()]
    found = []
    for rank, error, place in sorted(places)[:count]:
        row = int(rows[rank, place])
        start, interval = grids[row]
        end, share = int(ends[row, place]), float(executed[row, place]) / calls
        found.append(Plan(start=start, interval=interval, end=end, between=ranges[place], error=error, executed=share))
    return found


class _Both(Stretch):
    """One block; what is kept of it are its streams before it and after it."""

    def leave(self, output: Any) -> None:
        """See `Stretch`."""
        self.value = (*(tensor.neg() for tensor in self._negative), *self.layout.unpack(output))
        self._negative = ()
        if self.keep is not None:
            self.keep(self)
