"""`MagCache` (arXiv 2506.09045): when to compute, from how fast the cached value shrank or grew in calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_cache.engine.moment import Decision, Evidence, Moment, Streams
from dit_cache.engine.policies import Blind
from dit_cache.errors import ConfigError, GenerationError


@dataclass
class MagCache(Blind):
    """``Σ |1 − P| < threshold`` is a hole, P being the product of the ratios since the last computed step.

    It looks at nothing that is computed: ranks need not agree, and the time of a generation is known beforehand.

    Args:
        ratios: for each step the mean size of the value, as a multiple of that at the step before; for each branch, or
            the same for all. For another number of steps the nearest ones are taken. `MagCalibration` measures them:
            they belong to a model, its solver and its noise levels.
        threshold: at least 0; published: 0.12 for Wan2.1 1.3B, 0.24 for 14B.
        in_a_row: holes in a row at most; published: 2 or 4, and 6.
        retention: share of the steps, at the beginning, that are computed.
    """

    ratios: Sequence[float] | Mapping[str, Sequence[float]]
    threshold: float
    in_a_row: int
    retention: float = 0.2
    _product: float = field(default=1.0, init=False, repr=False)
    _error: float = field(default=0.0, init=False, repr=False)
    _skipped: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or self.in_a_row < 1 or not 0 <= self.retention <= 1:
            raise ValueError(
                f"threshold {self.threshold}, in_a_row {self.in_a_row}, retention {self.retention} were given; "
                "threshold >= 0, in_a_row >= 1 and 0 <= retention <= 1 are legal"
            )
        for ratios in self.ratios.values() if isinstance(self.ratios, Mapping) else (self.ratios,):
            if not ratios or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
                raise ValueError(f"ratios are {list(ratios)}; they have to be positive numbers, one for each step")

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        if at.step < int(self.retention * at.steps):
            return Decision(True, "first steps")
        self._product *= self._ratio(at)
        self._error += abs(1 - self._product)
        self._skipped += 1
        if self._skipped > self.in_a_row:
            return Decision(True, "too many holes", self._error)
        hole = self._error < self.threshold
        return Decision(not hole, "little change" if hole else "much change", self._error)

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Policy`."""
        self._product, self._error, self._skipped = 1.0, 0.0, 0

    def _ratio(self, at: Moment) -> float:
        ratios = self.ratios
        if isinstance(ratios, Mapping):
            if at.branch not in ratios:
                raise ConfigError(f"there are ratios for the branches {sorted(ratios)}, and none for {at.branch!r}")
            ratios = ratios[at.branch]
        return ratios[round(at.step * (len(ratios) - 1) / max(1, at.steps - 1))]


class MagRatios:
    """What `MagCalibration` measured, in all generations and branches since this was made."""

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}
        self._measured: dict[tuple[str, int], list[float]] = {}

    def __deepcopy__(self, memo: object) -> MagRatios:
        return self  # each branch of each generation works on a copy of the policy, and all write here

    def add(self, at: Moment, ratio: float) -> None:
        """Note a ratio.

        Raises:
            GenerationError: the generation has another number of steps than those before.
        """
        if (steps := self._steps.setdefault(at.branch, at.steps)) != at.steps:
            raise GenerationError(
                f"generations of {steps} steps were measured; take new MagRatios for {at.steps} steps"
            )
        self._measured.setdefault((at.branch, at.step), []).append(ratio)

    def ratios(self, branch: str = "") -> tuple[float, ...]:
        """Return the ratio of each step, the mean over generations; that of the first step is 1.

        Raises:
            ConfigError: a step of this branch was never measured.
        """
        later = [self._measured.get((branch, step), []) for step in range(1, self._steps.get(branch, 1))]
        if not later or not all(later):
            raise ConfigError(
                f"branch {branch!r} was not measured over a whole generation; branches are: {sorted(self._steps)}"
            )
        return (1.0, *(math.fsum(measured) / len(measured) for measured in later))

    def by_branch(self) -> dict[str, tuple[float, ...]]:
        """Return the ratios of every branch, as `MagCache` takes them."""
        return {branch: self.ratios(branch) for branch in self._steps}


@dataclass
class MagCalibration(Blind):
    """Compute everything, and measure ``mean over tokens of ‖r_i‖ / ‖r_{i−1}‖``, r being the value that is cached.

    Tokens whose value was 0 at the step before are left out. ::

        calibration = MagCalibration()
        ...  # one generation, or several of the same number of steps
        policy = MagCache(calibration.found.by_branch(), threshold=0.12, in_a_row=2)

    Args:
        found: where the ratios go.
        dim: the dimension along which a token lies: -1 for the change over blocks [B, tokens, width], 1 for a velocity
            [B, channels, …].
    """

    found: MagRatios = field(default_factory=MagRatios)
    dim: int = -1
    _before: Tensor | None = field(default=None, init=False, repr=False)

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        return Decision(True, "calibration")

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Policy`."""
        before = self._before
        self._before = now = torch.linalg.vector_norm(value[0].detach(), dim=self.dim, dtype=torch.float32)
        if before is not None:
            self.found.add(at, float((now / before)[before > 0].mean()))
