"""When to compute although the policy would not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_cache.engine.moment import Evidence, Moment, Streams


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that no decision crosses.

    Args:
        first, last: so many steps at either end are computed.
        in_a_row: holes in a row at most; None for no bound.
    """

    first: int = 1
    last: int = 0
    in_a_row: int | None = None
    needs: ClassVar[frozenset[str]] = frozenset()
    dynamic: ClassVar[bool] = False

    def overrule(self, at: Moment, seen: Evidence, *, skipped: int) -> str | None:
        """See `Guard`."""
        if at.step < self.first:
            return "first steps"
        if at.step >= at.steps - self.last:
            return "last steps"
        return "too many holes" if self.in_a_row is not None and skipped >= self.in_a_row else None

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Guard`."""


@dataclass(kw_only=True)
class Envelope:
    """Compute the next hole after all when the value changed more, or less, than it ever did in calibration.

    The change of a sample at step j is ``‖v_j − v_i‖ / ‖v_i‖``; one sample of a batch is enough.
    Here where i is the step with bounds before it, or the first that was
    computed. Looking at it waits for the device once for each step with bounds. It keeps a tensor of the size of the
    value in float32 for itself, which does not count as held by the cache.

    Args:
        bounds: step j → (lowest, highest) change that is normal there, for all steps that the policy computes.
        extra: steps that may be added in one generation, so that its time stays bounded.
    """

    bounds: Mapping[int, tuple[float, float]]
    extra: int = 2
    needs: ClassVar[frozenset[str]] = frozenset()
    dynamic: ClassVar[bool] = True
    _before: Tensor | None = field(default=None, init=False, repr=False)
    _alarm: bool = field(default=False, init=False, repr=False)

    def overrule(self, at: Moment, seen: Evidence, *, skipped: int) -> str | None:
        """See `Guard`."""
        if not self._alarm or self.extra <= 0:
            return None
        self.extra -= 1
        self._alarm = False
        return "outside the calibrated range"

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Guard`."""
        now = value[0].detach().float()
        if self._before is not None:
            if at.step not in self.bounds:
                return  # a step that was added; the next change is to be over the distance of calibration
            low, high = self.bounds[at.step]
            before, change = (each.reshape(len(each), -1) for each in (self._before, now - self._before))
            relative = torch.linalg.vector_norm(change, dim=1) / torch.linalg.vector_norm(before, dim=1)
            self._alarm = not bool(((relative >= low) & (relative <= high)).all())
        self._before = now.clone()
