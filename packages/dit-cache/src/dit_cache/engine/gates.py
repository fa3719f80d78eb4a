"""When to compute, by a look at what goes in: online gates.

============  ===========================================================================  ==========================
`TeaCache`    the timestep's embedding changed, in sum since the last computed step        arXiv 2411.19108
`EasyCache`   the output is expected to have changed, from the change of the latents       arXiv 2507.02860
`FirstBlock`  what the first blocks add changed, against the last computed step            ParaAttention; DBCache of
                                                                                           cache-dit
============  ===========================================================================  ==========================

Each of them measures in float32, waits for the device once in a decision, and computes where what it measured is not
finite: a change of nothing, say. `MagCache`, which looks at nothing, is in :mod:`.magnitude`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from torch import Tensor

from dit_cache.engine.guards import Limits
from dit_cache.engine.moment import Decision, Evidence, Moment, Streams
from dit_cache.errors import ParametersInvalid


class Fit(NamedTuple):
    """What `TeaCache` takes beside the threshold: ``TeaCache(0.08, *TEACACHE_WAN["1.3B", "plain"])``.

    Attributes:
        coefficients: of the polynomial, the highest degree first.
        first, last: steps at either end that are computed.
    """

    coefficients: tuple[float, ...]
    first: int
    last: int


TEACACHE_WAN: Mapping[tuple[str, str], Fit] = MappingProxyType(
    {
        ("1.3B", "plain"): Fit((2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774), 1, 1),
        ("14B", "plain"): Fit((-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), 1, 1),
        ("1.3B", "ret_steps"): Fit((-5.21862437e4, 9.23041404e3, -5.28275948e2, 13.6987616, -4.99875664e-2), 5, 0),
        ("14B", "ret_steps"): Fit((-3.03318725e5, 4.90537029e4, -2.65530556e3, 58.7365115, -0.315583525), 5, 0),
    }
)
"""Published by the authors of TeaCache (github.com/ali-vilab/TeaCache, TeaCache4Wan2.1) for text to video, 50 steps.

By size and mode. The signal of "plain" is the embedding of the timestep [B, dim]; that of "ret_steps" is its projection
[B, 6, dim], from which the blocks take their modulation. Published thresholds: 0.05 to 0.08 (1.3B), 0.14 to 0.2 (14B).
"""


@dataclass
class TeaCache:
    """``Σ p(relL1(e_i, e_{i−1})) < threshold`` since the last computed step is a hole; e is the signal, p a polynomial.

    Where the signal has nothing of the latents in it, as in Wan, the holes are the same for all samples.

    Args:
        threshold: at least 0.
        coefficients: of p, the highest degree first; p(x) = x when None. They belong to a model, and to its signal.
        first, last: steps at either end that are computed.
    """

    threshold: float
    coefficients: Sequence[float] | None = None
    first: int = 1
    last: int = 1
    needs: ClassVar[frozenset[str]] = frozenset({"signal"})
    dynamic: ClassVar[bool] = True
    once: ClassVar[bool] = False
    _before: Tensor | None = field(default=None, init=False, repr=False)
    _sum: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.threshold)
        if self.coefficients is not None and not self.coefficients:
            raise ValueError("coefficients are empty; give those of a polynomial, or None for p(x) = x")

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        if seen.signal is None:
            raise ParametersInvalid("TeaCache looks at the signal; give signal=, such as the embedding of the timestep")
        before, self._before = self._before, seen.signal().detach().clone()
        if (end := _at_an_end(at, self.first, self.last)) is not None:
            return end
        if before is None:
            return Decision(True, "nothing to compare")
        self._sum += self._mapped(float(relative_l1(self._before, before)))
        return _judged(self._sum, self.threshold)

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Policy`."""
        self._sum = 0.0

    def _mapped(self, change: float) -> float:
        if self.coefficients is None:
            return change
        result = 0.0
        for coefficient in self.coefficients:
            result = result * change + coefficient
        return result


@dataclass
class EasyCache:
    """``Σ ε < threshold`` since the last computed step is a hole, with ``ε = k · ‖x_i − x_{i−1}‖ / ‖v_{i−1}‖``.

    ``k = ‖v_j − v_h‖ / ‖x_j − x_h‖`` is the rate at the last two computed steps h and j, and ‖·‖ the mean of the
    absolute values. The predictor that belongs to it is `Offset`; ``v_{i−1}`` is taken to be what that gives,
    ``x_{i−1} + v_j − x_j``, whatever the predictor of the cache. The first side of the guidance decides for both.

    It keeps up to three tensors of the size of the latents for itself, which do not count as held by the cache.

    Args:
        threshold: at least 0; published: 0.05 for Wan2.1.
        first: steps at the beginning that are computed; published: 10 of 50.
        last: the same at the end.
    """

    threshold: float
    first: int = 10
    last: int = 1
    needs: ClassVar[frozenset[str]] = frozenset({"latents"})
    dynamic: ClassVar[bool] = True
    once: ClassVar[bool] = True
    _before: Tensor | None = field(default=None, init=False, repr=False)
    _kept: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _rate: Tensor | None = field(default=None, init=False, repr=False)
    _sum: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.threshold)

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        if seen.latents is None:
            raise ParametersInvalid("EasyCache looks at the latents, which were not given; a VelocityCache has them")
        before, self._before = self._before, seen.latents.detach().clone()  # a solver may write into its latents
        if (end := _at_an_end(at, self.first, self.last)) is not None:
            return end
        if before is None or self._kept is None or self._rate is None:
            return Decision(True, "nothing to compare")
        latents, value = self._kept
        change = _size(self._before - before) / _size(before + (value - latents))
        self._sum += float(self._rate * change)
        return _judged(self._sum, self.threshold)

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Policy`."""
        if self._before is None:
            return  # the other side of the guidance decides
        latents, velocity = self._before, value[0].detach()
        if self._kept is not None:
            self._rate = _size(velocity - self._kept[1]) / _size(latents - self._kept[0])
        self._kept = (latents, velocity.clone())
        self._sum = 0.0


@dataclass
class FirstBlock:
    """``relL1(p, p_j) < threshold`` is a hole; p is what the first blocks add, j the last computed step.

    `Limits` adds what is common with it: steps that are computed at the beginning, and a bound on holes in a row.

    It keeps a tensor of the size of the hidden states for itself, and a second one while a step is computed; they do
    not count as held by the cache.

    Args:
        threshold: at least 0.
        first: blocks at the beginning that are always computed, and looked at; at least 1.
        last: blocks at the end that are always computed.
    """

    threshold: float
    first: int = 1
    last: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    dynamic: ClassVar[bool] = True
    once: ClassVar[bool] = False
    _seen: Tensor | None = field(default=None, init=False, repr=False)
    _kept: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.threshold)
        if self.first < 1 or self.last < 0:
            raise ValueError(f"first {self.first} and last {self.last} blocks were given; first >= 1 and last >= 0")

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """See `Policy`."""
        if seen.probe is None:
            raise ParametersInvalid("FirstBlock looks at a probe, which was not given; `attach` makes a cache with one")
        self._seen = None  # freed before the next one is made
        self._seen = seen.probe().detach()
        if self._kept is None:
            return Decision(True, "nothing to compare")
        return _judged(float(relative_l1(self._seen, self._kept)), self.threshold)

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """See `Policy`."""
        assert self._seen is not None, "computed without a decision"
        self._kept = None  # freed before the copy
        self._kept, self._seen = self._seen.clone(), None


def relative_l1(now: Tensor, before: Tensor) -> Tensor:
    """Return ``mean|now − before| / mean|before|`` in float32, a scalar tensor; not finite where `before` is 0."""
    return _size(now.float() - before.float()) / _size(before)


def _size(tensor: Tensor) -> Tensor:
    return tensor.float().abs().mean()


def _check(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; it has to be at least 0, where everything is computed")


def _at_an_end(at: Moment, first: int, last: int) -> Decision | None:
    reason = Limits(first=first, last=last).overrule(at, Evidence(), skipped=0)
    return None if reason is None else Decision(True, reason)


def _judged(change: float, threshold: float) -> Decision:
    if not math.isfinite(change):
        return Decision(True, "not comparable")
    return Decision(False, "little change", change) if change < threshold else Decision(True, "much change", change)
