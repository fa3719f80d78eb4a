"""The denoising loop: the one place where the transformer is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wan_infer.caching import SIDES, Uncached
from wan_infer.errors import NumericsError
from wan_infer.parallel import Alone
from wan_infer.samplers import Sampler, guide
from wan_infer.transformer import TextContext, WanTransformer


@dataclass(frozen=True)
class Step:
    """What `on_step` is told.

    Attributes:
        index: steps done, from 1.
        steps: of the whole run.
        timestep: that was denoised, from 1000 down.
        latents: after the step, [B, C, T, h, w].
    """

    index: int
    steps: int
    timestep: float
    latents: Tensor


OnStep = Callable[[Step], None]


def denoise(
    transformer: WanTransformer,
    latents: Tensor,
    sampler: Sampler,
    contexts: Sequence[TextContext],
    *,
    guidance: float,
    condition: Tensor | None = None,
    on_step: OnStep | None = None,
    cached: Uncached | None = None,
    parallel: Alone | None = None,
) -> Tensor:
    """Return the latents at noise level 0, float32 [B, C, T, h, w].

    Args:
        transformer: predicts the velocity.
        latents: the noise.
        sampler: fresh from `make_sampler`.
        contexts: of the prompt and, for guidance, of the negative prompt.
        guidance: scale of the difference of the two.
        condition: as the transformer takes it.
        on_step: called after every step.
        cached: decides which steps are computed; all when None.
        parallel: who computes what; everything is computed here when None.

    Raises:
        NumericsError: a step gave NaN or infinity.
    """
    cached = cached or Uncached()
    parallel = parallel or Alone()

    def predict_side(name: str, context: TextContext) -> Tensor:
        times = timestep.float().expand(len(latents))
        with cached.side(index - 1, name):
            velocity: Tensor = transformer(latents, times, context, condition=condition, parallel=parallel)
        return velocity

    def predict() -> Tensor:
        sides = [partial(predict_side, *side) for side in zip(SIDES, contexts, strict=False)]
        velocity, *unconditional = parallel.sides(sides)
        return guide(velocity, unconditional[0], guidance) if unconditional else velocity

    for index, timestep in enumerate(sampler.timesteps, start=1):
        latents = sampler.step(cached.velocity(predict, latents), latents)
        if not torch.isfinite(latents).all():
            raise NumericsError(
                f"the latents are not finite after step {index} of {len(sampler)} (timestep {timestep.item():g}); "
                "check the checkpoint and the dtype: bfloat16 or float32, not float16"
            )
        if on_step is not None:
            on_step(Step(index, len(sampler), timestep.item(), latents))
    return latents
