"""Where a generation is, and what is decided there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Streams = tuple[Tensor, ...]  # one value: a velocity, or the change of one or two streams of a stack of blocks


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One evaluation of the model.

    Attributes:
        step: from 0.
        steps: of the generation.
        time: the noise level σ; the number of the step where no levels are known. Predictors extrapolate over it.
        branch: which side of the guidance; "" where there is one only, or both are computed together.
    """

    step: int
    steps: int
    time: float
    branch: str = ""


@dataclass(frozen=True)
class Decision:
    """Compute, or fill the hole with a prediction.

    Attributes:
        compute: which of the two.
        reason: in a word or two; the ledger counts them.
        indicator: the number that was held against a threshold, if there was one.
    """

    compute: bool
    reason: str
    indicator: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a policy or a guard may look at; the cache that is used says what there is.

    Attributes:
        latents: the input of the model.
        signal: returns what stands for the timestep, such as its embedding.
        probe: runs the first blocks, and returns what they added; the work is not lost when the rest is computed.
    """

    latents: Tensor | None = None
    signal: Callable[[], Tensor] | None = None
    probe: Callable[[], Tensor] | None = None
