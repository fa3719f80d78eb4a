"""What is put in a hole. Every predictor here is a linear combination; see `Predictor`.

============  =========================================================================================================
`Reuse`       the last value
`Taylor`      the polynomial through the last ``order + 1`` values, at their true times (Newton's divided differences)
`Secant`      the last value, moved along a slope taken from the displacement of the latents (MeanCache, arXiv
              2601.19961)
`Offset`      the last value minus its latents, plus the latents now (EasyCache, arXiv 2507.02860)
`Planned`     for each hole an order of its own, and where a searcher fitted them, weights of its own
============  =========================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from dit_cache.engine.moment import Moment
from dit_cache.engine.protocols import Weights


@dataclass(frozen=True)
class Reuse:
    """The last value that was computed."""

    history: ClassVar[int] = 1
    uses_latents: ClassVar[bool] = False

    def weights(self, at: Moment, kept: Sequence[Moment]) -> Weights:
        """See `Predictor`."""
        return Weights((*(0.0 for _ in kept[:-1]), 1.0))


@dataclass(frozen=True)
class Taylor:
    """The polynomial of degree `order` through the last values, at their own times, whatever the gaps between them.

    It is the forecast of TaylorSeer (arXiv 2503.06923) with divided differences in place of finite ones, which are
    right for equal gaps only. Where fewer values are kept than it takes, the order is lower.

    Args:
        order: 0 is `Reuse`, 1 a line, 2 a parabola.
    """

    order: int = 1
    uses_latents: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 4:
            raise ValueError(f"order is {self.order}; it has to be from 0 to 4 (beyond that, extrapolation is noise)")

    @property
    def history(self) -> int:
        """Values it looks back."""
        return self.order + 1

    def weights(self, at: Moment, kept: Sequence[Moment]) -> Weights:
        """See `Predictor`; Lagrange's form of the polynomial."""
        used = [moment.time for moment in kept[-self.history :]]
        return Weights((*(0.0 for _ in kept[: -self.history]), *lagrange(at.time, used)))


@dataclass(frozen=True)
class Secant:
    """``v_j + (t − t_j) · s`` with ``s = (x_j − x_i − (t_j − t_i) v_i) / (t_j − t_i)²``, x being the latents.

    The displacement of the latents between two computed steps i and j gives the mean velocity on the way; it differs
    from ``v_i`` by about half the slope. That half is what the mean over a jump from ``t_j`` to ``t`` takes.
    """

    history: ClassVar[int] = 2
    uses_latents: ClassVar[bool] = True

    def weights(self, at: Moment, kept: Sequence[Moment]) -> Weights:
        """See `Predictor`."""
        if len(kept) == 1:
            return Weights((1.0,))
        gap = kept[-1].time - kept[-2].time
        way = (at.time - kept[-1].time) / gap
        before = (0.0,) * (len(kept) - 2)
        return Weights((*before, -way, 1.0), (*before, -way / gap, way / gap))


@dataclass(frozen=True)
class Offset:
    """``x + (v_j − x_j)``: what the model added to its input is what stays."""

    history: ClassVar[int] = 1
    uses_latents: ClassVar[bool] = True

    def weights(self, at: Moment, kept: Sequence[Moment]) -> Weights:
        """See `Predictor`."""
        before = (0.0,) * (len(kept) - 1)
        return Weights((*before, 1.0), (*before, -1.0), 1.0)


@dataclass(frozen=True)
class Planned:
    """A predictor for each hole.

    Args:
        orders: step of a hole → degree of the polynomial there; 1 where it is not named.
        fitted: step of a hole → (computed step → weight); in force where these steps are what is kept, else the last
            value is repeated.
    """

    orders: Mapping[int, int] = field(default_factory=dict)
    fitted: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    uses_latents: ClassVar[bool] = False

    @property
    def history(self) -> int:
        """Values it looks back: as many as the most demanding hole takes."""
        orders = [order + 1 for order in self.orders.values()]
        return max(2, *orders, *map(len, self.fitted.values()), 0)

    def weights(self, at: Moment, kept: Sequence[Moment]) -> Weights:
        """See `Predictor`."""
        fitted = self.fitted.get(at.step)
        steps = [moment.step for moment in kept]
        # An extra computation, by a guard, changes what is kept: the fitted weights are then for other values.
        if fitted and steps[-len(fitted) :] == sorted(fitted):
            return Weights(tuple(fitted.get(step, 0.0) for step in steps))
        return Taylor(self.orders.get(at.step, 0 if fitted else 1)).weights(at, kept)


def lagrange(time: float, nodes: Sequence[float]) -> list[float]:
    """Return the weight of the value at each node in the polynomial through all of them, at `time`."""
    weights = []
    for index, node in enumerate(nodes):
        weight = 1.0
        for other in (*nodes[:index], *nodes[index + 1 :]):
            weight *= (time - other) / (node - other)
        weights.append(weight)
    return weights
