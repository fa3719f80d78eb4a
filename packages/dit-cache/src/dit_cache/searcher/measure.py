"""Running the generation that is searched for: recording it, disturbing it, and scoring schedules in it.

A *run* is the user's own loop. It is handed samples and a cache, and returns the final latents::

    def run(samples, cache):                       # samples: whatever was given to `search`, as many as `batch`
        latents = torch.stack([noise(s) for s in samples])
        with cache.generation(sigmas):
            for timestep in timesteps:
                velocity = cache.velocity(lambda: guided(model, latents, timestep), latents)
                latents = solver(velocity, latents)
        return latents                             # [len(samples), …]

What is handed to `cache.velocity` is what the solver gets, guidance included, and the batch is the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_cache.engine.policies import Always
from dit_cache.engine.velocity import VelocityCache
from dit_cache.errors import SearchError

Sample = TypeVar("Sample")
Run = Callable[[Sequence[Sample], VelocityCache], Tensor]

_CHUNK = 1 << 18  # elements of a velocity that are multiplied at once, in float64


class Recorder(VelocityCache):
    """Computes everything, and keeps the velocities of every step."""

    def __init__(self) -> None:
        super().__init__(Always())
        self.velocities: list[Tensor] = []

    @contextmanager
    def generation(self, sigmas: Sequence[float] | int) -> Iterator[Recorder]:
        """See `Cache`; a second one begins anew."""
        self.velocities.clear()
        with super().generation(sigmas):
            yield self

    def velocity(self, predict: Callable[[], Tensor], latents: Tensor, **moment: Any) -> Tensor:
        """See `VelocityCache`."""
        value = super().velocity(predict, latents, **moment)
        self.velocities.append(value.detach().clone())
        return value

    def gram(self) -> Tensor:
        """Return the inner products of the velocities of each sample, float64 [N, T, T]."""
        samples = range(len(self.velocities[0]))
        return torch.stack([_gram([velocity[n].flatten() for velocity in self.velocities]) for n in samples])


class Disturbed(VelocityCache):
    """Replays a recorded generation up to a step, puts the velocity before in its place, and computes the rest.

    Args:
        velocities: that were recorded.
        step: that is disturbed, from 1.
    """

    def __init__(self, velocities: Sequence[Tensor], step: int) -> None:
        super().__init__(Always())
        self._velocities = velocities
        self._disturbed = step

    def velocity(self, predict: Callable[[], Tensor], latents: Tensor, **moment: Any) -> Tensor:
        """See `VelocityCache`."""
        step = len(self.ledger.entries)
        replayed = self._velocities[min(step, self._disturbed - 1)].clone()
        # What was before the disturbance is known: a run of the rest is all that is computed.
        return super().velocity(predict if step > self._disturbed else lambda: replayed, latents, **moment)

    def disturbance(self) -> Tensor:
        """Return ‖v_{t−1} − v_t‖ of each sample, [N]."""
        change = self._velocities[self._disturbed - 1] - self._velocities[self._disturbed]
        norms: Tensor = torch.linalg.vector_norm(change.flatten(1).cpu().double(), dim=1)
        return norms


def run_checked(run: Run[Sample], samples: Sequence[Sample], cache: VelocityCache, steps: int) -> Tensor:
    """Return the final latents of a run, on the CPU, after a look at what it did.

    Raises:
        SearchError: it is no run as this module describes it.
    """
    with torch.no_grad():
        final = run(samples, cache)
    evaluations = len(cache.ledger.entries)
    if evaluations != steps:
        raise SearchError(
            f"the run asked for {evaluations} velocities; {steps} are expected, one for each sigma: guidance belongs "
            "inside of what is handed to cache.velocity"
        )
    return checked_latents(final, len(samples))


def checked_latents(final: object, count: int) -> Tensor:
    """Return the final latents of a run on the CPU.

    Raises:
        SearchError: they are not what a run of so many samples returns, or not finite.
    """
    if not isinstance(final, Tensor) or final.ndim < 2 or len(final) != count:
        shape = list(final.shape) if isinstance(final, Tensor) else type(final).__name__
        raise SearchError(f"the run returned {shape} for {count} samples; latents [{count}, …] are expected")
    if not bool(torch.isfinite(final).all()):
        raise SearchError("the run returned latents that are not finite; it has to work without a cache first")
    return final.detach().to("cpu", copy=True)  # the run may use its tensor again


def gains(final: Tensor, reference: Tensor, disturbed: Disturbed, width: float) -> list[float]:
    """Return ‖δx‖ / (|Δσ_t| ‖v_{t−1} − v_t‖) of each sample: what is left at the end of a disturbance at step t.

    Args:
        final: latents of the disturbed run.
        reference: of the recorded one.
        disturbed: the cache that disturbed.
        width: |Δσ_t|.
    """
    moved = (final - reference).flatten(1).double().norm(dim=1)
    put = disturbed.disturbance() * width
    return [float(m / p) if p > 0 else 0.0 for m, p in zip(moved, put, strict=True)]


def decibels(final: Tensor, reference: Tensor) -> list[float]:
    """Return −20·log10(‖x − x_ref‖ / ‖x_ref‖) in dB of each sample; at most 200."""
    off = (final - reference).flatten(1).double().norm(dim=1)
    size = reference.flatten(1).double().norm(dim=1).clamp(min=1e-30)
    return [-20 * math.log10(max(float(o / s), 1e-10)) for o, s in zip(off, size, strict=True)]


def _gram(velocities: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(len(velocities), len(velocities), dtype=torch.float64)
    for start in range(0, velocities[0].numel(), _CHUNK):
        # Not on the device: not every accelerator has float64.
        part = torch.stack([velocity[start : start + _CHUNK].cpu() for velocity in velocities]).double()
        total += part @ part.T
    return total
