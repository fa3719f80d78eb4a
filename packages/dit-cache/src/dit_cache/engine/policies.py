"""When to compute, without looking at what is computed: static policies. Those that look are in :mod:`.gates`.

They need no synchronisation between ranks, and the time of a generation is known beforehand.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from dit_cache.engine.moment import Decision, Evidence, Moment, Streams

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Static:
    """Compute at the steps that are named.

    Args:
        steps: of which the first is 0: there is nothing to predict from before.
    """

    steps: Collection[int]
    needs: frozenset[str] = field(default=_NOTHING, init=False)
    dynamic: bool = field(default=False, init=False)
    once: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if 0 not in self.steps:
            raise ValueError(f"the computed steps are {sorted(self.steps)}; 0 has to be one of them")
        object.__setattr__(self, "steps", frozenset(self.steps))

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        return Decision(True, "planned") if at.step in self.steps else Decision(False, "hole")

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Policy`."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Compute every `interval` steps from `start` on, until `end`, and everywhere outside.

    A hole is where ``start < step <= end`` and ``(step - start) % interval != 0``: the rule of MindIE SD.
    """

    interval: int
    start: int = 0
    end: int = 10000
    needs: frozenset[str] = field(default=_NOTHING, init=False)
    dynamic: bool = field(default=False, init=False)
    once: bool = field(default=False, init=False)

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

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Policy`."""


@dataclass(frozen=True)
class Always:
    """Compute everything: the reference."""

    needs: frozenset[str] = field(default=_NOTHING, init=False)
    dynamic: bool = field(default=False, init=False)
    once: bool = field(default=False, init=False)

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        return Decision(True, "always")

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Policy`."""
