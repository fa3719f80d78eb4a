"""The exact shortest schedules of all lengths, by dynamic programming.

A prediction looks back at two computed steps, so a state is a pair (i, j) of the last two, and::

    D_b(j, k) = min over i of  D_{b−1}(i, j) + cost(i, j, k)^γ

with b steps computed so far. One pass gives the best schedule for every budget at once. γ trades the sum of the costs
(1) against the largest of them (larger γ).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dit_cache.searcher.costs import Costs

State = tuple[int, int]


def shortest_schedules(costs: Costs, steps: int, *, power: float = 1.0) -> dict[int, tuple[int, ...]]:
    """Return the computed steps of the cheapest schedule for every number of computed steps that is possible.

    Args:
        costs: of the segments (i, j, k); what is missing is not allowed. k = `steps` is the end.
        steps: of the generation.
        power: γ.
    """
    follow: dict[State, list[tuple[int, float]]] = {}
    for (i, j, k), cost in costs.items():
        follow.setdefault((i, j), []).append((k, cost**power))
    layers: list[dict[State, tuple[float, State | None]]] = [{(-1, 0): (0.0, None)}]
    found = {}
    for budget in range(1, steps + 1):
        layer = layers[-1]
        ends = {s: c + dict(follow.get(s, [])).get(steps, math.inf) for s, (c, _) in layer.items()}
        if ends and min(ends.values()) < math.inf:
            found[budget] = _walk_back(layers, min(ends, key=ends.__getitem__))
        layers.append(_next_layer(layer, follow, steps))
    return found


def _next_layer(
    layer: Mapping[State, tuple[float, State | None]], follow: Mapping[State, list[tuple[int, float]]], steps: int
) -> dict[State, tuple[float, State | None]]:
    following: dict[State, tuple[float, State | None]] = {}
    for state, (so_far, _) in layer.items():
        for k, cost in follow.get(state, ()):
            reached = (state[1], k)
            if k < steps and so_far + cost < following.get(reached, (math.inf, None))[0]:
                following[reached] = (so_far + cost, state)
    return following


def _walk_back(layers: list[dict[State, tuple[float, State | None]]], last: State) -> tuple[int, ...]:
    computed, state = [], last
    for layer in reversed(layers):
        computed.append(state[1])
        before = layer[state][1]
        if before is None:
            break
        state = before
    return tuple(reversed(computed))


def total_cost(costs: Costs, computed: tuple[int, ...], steps: int) -> float:
    """Return the sum of the costs of a schedule; infinite where it has a segment that is not allowed."""
    marks = (-1, *computed, steps)
    return sum(costs.get((i, j, k), math.inf) for i, j, k in zip(marks, marks[1:], marks[2:], strict=False))
