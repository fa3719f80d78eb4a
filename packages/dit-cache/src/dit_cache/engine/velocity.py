"""The cache of the velocity: around the model, at the solver. It knows nothing of blocks, and a hole costs nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from dit_cache.engine.cache import Cache
from dit_cache.engine.moment import Evidence
from dit_cache.errors import GenerationError, ParametersInvalid


class VelocityCache(Cache):
    """Keeps what the solver is given: as a rule the velocity after guidance, a tensor of the size of the latents.

    ::

        with cache.generation(sigmas):
            for timestep in timesteps:
                velocity = cache.velocity(lambda: guided(model, latents, timestep), latents)
                latents = solver(velocity, latents)

    A predicted velocity goes through the solver like a computed one, so the history of a multistep solver stays valid.
    Arguments: those of `Cache`.
    """

    offers = frozenset({"latents", "signal"})
    expected: Mapping[int, float] = MappingProxyType({})  # relative error of a hole, where something is known of it

    def velocity(
        self,
        predict: Callable[[], Tensor],
        latents: Tensor,
        *,
        step: int | None = None,
        branch: str = "",
        part: str = "",
        signal: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Return the velocity of this step, computed by `predict` or predicted.

        Args:
            predict: computes it. Called at most once.
            latents: the input of the model, [B, …].
            step: from 0; the one after the last of this branch when None.
            branch: which side of the guidance, where the two are cached one by one: "cond", "uncond". On ranks that
                each compute one side, nothing is needed: each has its own cache.
            part: which transformer, where a model has several; nothing is predicted across their boundary.
            signal: returns what stands for the timestep, for policies that look at it.

        Raises:
            GenerationError: no generation is going on, or the step is not one of it.
        """
        at, side = self._moment(step, branch)
        if side.shape not in (None, latents.shape):
            raise GenerationError(
                f"the latents are {list(latents.shape)}, they were {list(side.shape or ())} before in this generation"
            )
        side.shape = latents.shape
        if side.memories and part not in side.memories:
            side.memories.clear()  # of another transformer, which is not called again in this generation
            side.policy = copy.deepcopy(self.policy)  # what it saw was that one
        memory = self._memory(side, part)
        seen = Evidence(latents=latents, signal=signal)
        decision = self._decide(at, side, seen, ready=len(memory) > 0, device=latents.device)
        if not decision.compute:
            (value,) = memory.predict(at, latents=latents)
            self._note(at, side, decision, predicted=self.expected.get(at.step))
            return value
        value = predict()
        if not isinstance(value, Tensor):
            raise ParametersInvalid(f"the velocity that was computed is a {type(value).__name__}; a tensor is expected")
        realised = None
        if self.measure and len(memory):
            realised = float(memory.error(at, (value,), latents))
        memory.put(at, (value,), latents)
        self._tell(at, side, seen, (value,))
        self._note(at, side, decision, realised=realised)
        return value

    def bytes_for(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, branches: int = 1) -> int:
        """Return the bytes that a generation holds at its peak, once as many steps are computed as are looked back at.

        Args:
            shape: of the latents, with the batch.
            dtype: of velocity and latents.
            branches: that are cached one by one.
        """
        kinds = 2 if self.predictor.uses_latents else 1
        return branches * kinds * self.predictor.history * self.store.nbytes(shape, dtype)
