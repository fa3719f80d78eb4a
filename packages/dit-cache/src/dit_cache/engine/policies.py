"""When to compute, without looking at what is computed: static policies. Those that look are in :mod:`.gates`.

They need no synchronisation between ranks, and the time of a generation is known beforehand.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from dit_cache.engine.moment import Decision, Evidence, Moment, Streams


class Blind:
    """What policies that look at nothing have in common; see `Policy`."""

    needs: ClassVar[frozenset[str]] = frozenset()
    dynamic: ClassVar[bool] = False
    once: ClassVar[bool] = False

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Policy`; it does not matter."""


@dataclass(frozen=True)
class Static(Blind):
    """Compute at the steps that are named.

    Args:
        steps: of which the first is 0: there is nothing to predict from before.
    """

    steps: Collection[int]

    def __post_init__(self) -> None:
        if 0 not in self.steps:
            raise ValueError(f"the computed steps are {sorted(self.steps)}; 0 has to be one of them")
        object.__setattr__(self, "steps", frozenset(self.steps))

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        return Decision(True, "planned") if at.step in self.steps else Decision(False, "hole")


@dataclass(frozen=True, kw_only=True)
class Interval(Blind):
    """Compute every `interval` steps from `start` on, until `end`, and everywhere outside.

    A hole is where ``start < step <= end`` and ``(step - start) % interval != 0``: the rule of MindIE SD.
    """

    interval: int
    start: int = 0
    end: int = 10000

    def __post_init__(self) -> None:
        if self.interval < 1 or self.start < 0 or self.end < self.start:
            raise ValueError(
                f"interval {self.interval}, start {self.start}, end {self.end} were given; "
                "interval >= 1 and 0 <= start <= end are legal"
            )

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        if not self.start < at.step <= self.end:
            return Decision(True, "outside")
        return Decision(True, "refresh") if (at.step - self.start) % self.interval == 0 else Decision(False, "hole")


@dataclass(frozen=True)
class Always(Blind):
    """Compute everything: the reference."""

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        return Decision(True, "always")
