"""What a hole costs, from inner products alone.

Every predictor is a linear combination of recorded velocities, so the error of a prediction is one as well, and its
norm needs only the Gram matrix ``G[a, b] = <v_a, v_b>`` of a recorded run: T × T numbers for each sample.

A *segment* (i, j, k) computes at j and at k and nothing between, and had computed at i before. Its cost is the effect
of its holes on the final latents, to first order::

    cost(i, j, k) = mean over samples of ‖ Σ g_τ |Δσ_τ| e_τ ‖²,   j < τ < k,   e_τ = predicted − computed velocity

The sum is signed: errors within one segment point the same way, and add up or cancel. ``g_τ``, the propagation gain,
says how much of a disturbance at step τ is left at the end (measured; see `measure`).

Letters: N samples, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_cache.engine.predictors import lagrange

# On the diagonal, relative to it. It bounds the weights where computed values are nearly parallel.
RIDGE = 1e-6
ANCHORS = 4  # values that a fitted hole is filled from; more gained nothing


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What calibration left.

    Attributes:
        gram: float64 [N, T, T], inner products of the velocities of each sample.
        gains: float64 [T].
        sigmas: float64 [T + 1], the end included.
    """

    gram: Tensor
    gains: Tensor
    sigmas: Tensor

    @property
    def steps(self) -> int:
        """T."""
        return self.gram.shape[1]

    @property
    def reach(self) -> Tensor:
        """How far an error of the velocity at each step gets, g·|Δσ|, [T]."""
        return self.gains * self.sigmas.diff().abs()

    def norm2(self, rows: Tensor) -> Tensor:
        """Return the mean over samples of the squared norms of combinations [R, T] of the velocities, [R]."""
        return torch.einsum("rt,ntu,ru->rn", rows, self.gram, rows).clamp(min=0).mean(1)

    def fit(self, anchors: Sequence[int], holes: Sequence[int]) -> Tensor:
        """Return the weights [holes, anchors] of the least squared error over all samples."""
        total = self.gram.sum(0)
        matrix = total[anchors][:, anchors]
        matrix = matrix + RIDGE * torch.diag(matrix.diagonal())
        weights: Tensor = torch.linalg.solve(matrix, total[anchors][:, holes]).T
        return weights


Costs = Mapping[tuple[int, int, int], float]


def hole_weights(recording: Recording, kind: str, anchors: Sequence[int], holes: Sequence[int]) -> Tensor:
    """Return the weights [holes, anchors] of a kind: "f" for fitted ones, a digit for the degree of a polynomial."""
    if kind == "f":
        return recording.fit(anchors, holes)
    used = anchors[-int(kind) - 1 :]
    nodes = [float(recording.sigmas[step]) for step in used]
    rows = [[0.0] * (len(anchors) - len(used)) + lagrange(float(recording.sigmas[hole]), nodes) for hole in holes]
    return torch.tensor(rows, dtype=torch.float64)


def segment_costs(recording: Recording, kinds: Sequence[str], *, longest: int) -> Costs:
    """Return the cost of every segment (i, j, k) under the best of `kinds`, i being −1 before the second computed step.

    Args:
        longest: holes in a row at most.
    """
    steps, costs = recording.steps, {}
    for j in range(steps):
        for i in [-1] if j == 0 else range(max(0, j - longest - 1), j):
            holes = list(range(j + 1, min(steps, j + longest + 1)))
            anchors = [j] if i < 0 else [i, j]
            best = torch.stack([_prefix_costs(recording, kind, anchors, holes) for kind in kinds]).amin(0)
            costs.update({(i, j, j + 1 + n): float(cost) for n, cost in enumerate(best)})
    return costs


def _prefix_costs(recording: Recording, kind: str, anchors: Sequence[int], holes: Sequence[int]) -> Tensor:
    """The cost of leaving out the first 0, 1, … all of the holes, [len(holes) + 1]."""
    rows = torch.zeros(len(holes) + 1, recording.steps, dtype=torch.float64)
    if holes:
        errors = torch.zeros(len(holes), recording.steps, dtype=torch.float64)
        errors[:, anchors] = hole_weights(recording, kind, anchors, holes)
        errors[range(len(holes)), holes] -= 1
        rows[1:] = (errors * recording.reach[holes, None]).cumsum(0)
    return recording.norm2(rows)
