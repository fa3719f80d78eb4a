"""A flow that takes no time: a small network as the velocity, and Euler's rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_cache import VelocityCache

Sample = tuple[str, int]
SHAPE = (3, 4, 5)


class ToyFlow:
    """Counts how often its velocity is computed, sample by sample.

    Args:
        steps: of a generation.
    """

    def __init__(self, steps: int = 12) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sigmas = [1 - (n / steps) ** 1.5 for n in range(steps)] + [0.0]
        self.inner = torch.randn(60, 60, generator=generator, dtype=torch.float64) / 60**0.5
        self.evaluations = 0

    def field(self, latents: Tensor, sigma: float) -> Tensor:
        self.evaluations += len(latents)
        flat = latents.flatten(1).double()
        value = torch.tanh(flat @ self.inner + 2 * sigma) * (1 + sigma) - 0.3 * flat
        return value.view_as(latents).float()

    def noise(self, samples: Sequence[Sample]) -> Tensor:
        drawn = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for _, seed in samples]
        return torch.stack(drawn)

    def run(self, samples: Sequence[Sample], cache: VelocityCache) -> Tensor:
        latents = self.noise(samples)
        with cache.generation(self.sigmas):
            for now, after in zip(self.sigmas, self.sigmas[1:], strict=False):
                velocity = cache.velocity(self._at(latents, now), latents)
                latents = latents + (after - now) * velocity
        return latents

    def plain(self, samples: Sequence[Sample], change: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """The same without any cache; `change` may put another velocity in place of one."""
        latents = self.noise(samples)
        for step, (now, after) in enumerate(zip(self.sigmas, self.sigmas[1:], strict=False)):
            velocity = self.field(latents, now)
            latents = latents + (after - now) * (velocity if change is None else change(step, velocity))
        return latents

    def _at(self, latents: Tensor, sigma: float) -> Callable[[], Tensor]:
        return lambda: self.field(latents, sigma)


def samples(first: int, count: int) -> list[Sample]:
    return [("any", seed) for seed in range(first, first + count)]
