"""The four questions that a cache asks, each answered by an object of its own.

=============  ==================================  ===================================================
`Policy`       when is it computed?                :mod:`.policies`, :mod:`.gates`
`Predictor`    what is put in a hole?              :mod:`.predictors`
`Store`        where are the computed values kept? :mod:`.store`
`Guard`        when is it computed after all?      :mod:`.guards`
=============  ==================================  ===================================================

A policy or guard that is handed to a cache is a template: each generation, and each branch of it, works on a copy of
its own (`copy.deepcopy`), so nothing of an aborted generation is ever left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dit_cache.engine.moment import Decision, Evidence, Moment, Streams


@runtime_checkable
class Policy(Protocol):
    """When to compute.

    Attributes:
        needs: which parts of the `Evidence` it looks at: "latents", "signal", "probe".
        dynamic: whether decisions depend on what is computed; ranks that share a generation then have to agree.
        once: whether the first branch of a step decides for the others.
    """

    @property
    def needs(self) -> frozenset[str]: ...  # noqa: D102
    @property
    def dynamic(self) -> bool: ...  # noqa: D102
    @property
    def once(self) -> bool: ...  # noqa: D102

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        """Say whether to compute at this moment."""

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """Be told what was computed."""


@dataclass(frozen=True)
class Weights:
    """A prediction as a sum: weights of the kept values, of the latents at which they were computed, and of those now.

    Attributes:
        values: of the kept values, the oldest first.
        latents: of the latents of the same moments; empty when all are 0.
        here: of the latents now.
    """

    values: tuple[float, ...]
    latents: tuple[float, ...] = ()
    here: float = 0.0


@runtime_checkable
class Predictor(Protocol):
    """What to put in a hole: a linear combination of what was computed, with weights that depend on times only.

    The same weights serve the engine, which combines tensors, and the searcher, which knows their inner products only.

    Attributes:
        history: how many computed values it looks back at most.
        uses_latents: whether `Weights.latents` or `Weights.here` is ever other than 0.
    """

    @property
    def history(self) -> int: ...  # noqa: D102
    @property
    def uses_latents(self) -> bool: ...  # noqa: D102

    def weights(self, at: Moment, kept: Sequence[Moment]) -> Weights:
        """Return the weights for a hole `at` a moment, `kept` being at least one computed moment, the oldest first."""


@runtime_checkable
class Store(Protocol):
    """Where computed values are kept."""

    def keep(self, value: Tensor) -> Tensor:
        """Return what is kept of a tensor; nobody else writes into it."""

    def take(self, kept: Tensor, device: torch.device) -> Tensor:
        """Return a kept tensor where it is needed; read only."""

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return how many bytes `keep` takes for a tensor of this kind."""


@runtime_checkable
class Guard(Protocol):
    """When to compute although the policy would not.

    Attributes:
        needs, dynamic: as those of a policy.
    """

    @property
    def needs(self) -> frozenset[str]: ...  # noqa: D102
    @property
    def dynamic(self) -> bool: ...  # noqa: D102

    def overrule(self, at: Moment, seen: Evidence, *, skipped: int) -> str | None:
        """Return the reason to compute at a moment that the policy would skip, after `skipped` holes in a row."""

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        """Be told what was computed."""
