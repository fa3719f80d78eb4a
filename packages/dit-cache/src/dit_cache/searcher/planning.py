"""From a recording to schedules, without running anything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from dit_cache.schedule import COMPUTED, FITTED, Schedule
from dit_cache.searcher.costs import ANCHORS, Costs, Recording, hole_weights, segment_costs
from dit_cache.searcher.dynamic import shortest_schedules, total_cost

Computed = tuple[int, ...]  # steps

_POWERS = (0.5, 1.0, 2.0)
_WINDOW = 3  # steps that a computed one is moved at most


class Planner:
    """Plans schedules for a recorded generation.

    Args:
        recording: of the calibration samples.
        kinds: that a gap may be filled with: "f" for fitted weights, a digit for the degree of a polynomial.
        blank: a schedule whose provenance the planned ones get.
    """

    def __init__(self, recording: Recording, kinds: Sequence[str], blank: Schedule) -> None:
        self._recording = recording
        self._kinds = kinds
        self._blank = blank

    @cached_property
    def _costs(self) -> Costs:
        longest = max(4, min(16, self._recording.steps // 3))
        # Segments have two anchors: a parabola has no cost here, and is tried once the computed steps are known.
        return segment_costs(self._recording, [kind for kind in self._kinds if kind != "2"], longest=longest)

    @cached_property
    def by_count(self) -> dict[int, list[Computed]]:
        """Number of computed steps → the cheapest choices of them, for one power of the costs or another."""
        found: dict[int, list[Computed]] = {}
        for power in _POWERS:
            for count, computed in shortest_schedules(self._costs, self._recording.steps, power=power).items():
                if computed not in found.setdefault(count, []):
                    found[count].append(computed)
        return found

    def moves(self, computed: Computed) -> list[Computed]:
        """Return the choices in which one computed step lies a few steps off, the cheapest first."""
        steps = self._recording.steps
        others = {
            tuple(sorted({*computed[:n], *computed[n + 1 :], step + off}))
            for n, step in enumerate(computed)
            for off in range(-_WINDOW, _WINDOW + 1)
            if n > 0 and 0 < step + off < steps and step + off not in computed
        }
        ranked = sorted((total_cost(self._costs, other, steps), other) for other in others)
        return [other for cost, other in ranked if cost < math.inf]

    def schedule(self, computed: Computed) -> Schedule:
        """Return the schedule with these computed steps, its holes filled as well as the recording allows."""
        plan = [COMPUTED] * self._recording.steps
        fitted: dict[int, dict[int, float]] = {}
        errors: dict[int, float] = {}
        for start, end in zip(computed, (*computed[1:], self._recording.steps), strict=True):
            holes = range(start + 1, end)
            if not holes:
                continue
            anchors = [step for step in computed if step <= start][-ANCHORS:]
            kind = min(self._possible(len(anchors)), key=lambda kind: self._gap_cost(kind, anchors, holes))
            plan[start + 1 : end] = kind * len(holes)
            weights = hole_weights(self._recording, kind, anchors, holes)
            errors |= self._errors(weights, anchors, holes)
            if kind == FITTED:
                rows = zip(holes, weights.tolist(), strict=True)
                fitted |= {hole: dict(zip(anchors, row, strict=True)) for hole, row in rows}
        return Schedule(
            plan="".join(plan),
            sigmas=self._blank.sigmas,
            fitted=fitted,
            made=self._blank.made,
            calibration=self._blank.calibration,
            validation=self._blank.validation,
            envelope=_envelope(self._recording.gram, computed),
            errors=errors,
        )

    def _errors(self, weights: Tensor, anchors: Sequence[int], holes: Sequence[int]) -> dict[int, float]:
        """Root mean square over the samples of the errors of predictions, relative to what is computed there."""
        rows = torch.zeros(len(holes), self._recording.steps, dtype=torch.float64)
        rows[:, anchors] = weights
        rows[range(len(holes)), holes] -= 1
        size = self._recording.gram.mean(0).diagonal()[list(holes)].clamp(min=1e-30)
        return dict(zip(holes, (self._recording.norm2(rows) / size).sqrt().tolist(), strict=True))

    def _possible(self, anchors: int) -> list[str]:
        return [kind for kind in self._kinds if kind == FITTED or int(kind) < anchors]

    def _gap_cost(self, kind: str, anchors: Sequence[int], holes: Sequence[int]) -> float:
        row = torch.zeros(1, self._recording.steps, dtype=torch.float64)
        reach = self._recording.reach[list(holes)]
        row[0, anchors] = (hole_weights(self._recording, kind, anchors, holes) * reach[:, None]).sum(0)
        row[0, holes] -= reach
        return float(self._recording.norm2(row))


def _envelope(gram: Tensor, computed: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Mean ± 3 standard deviations over the samples of ‖v_j − v_i‖ / ‖v_i‖ between computed steps i and j."""
    bounds = {}
    for i, j in itertools.pairwise(computed):
        change = ((gram[:, i, i] + gram[:, j, j] - 2 * gram[:, i, j]).clamp(min=0) / gram[:, i, i]).sqrt()
        spread = 3 * float(change.std(correction=0))
        bounds[j] = (max(0.0, float(change.mean()) - spread), float(change.mean()) + spread)
    return bounds
