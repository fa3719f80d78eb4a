"""Samplers for flow matching: from noise at σ = 1, along the velocity that the transformer predicts, to data at σ = 0.

At noise level σ the latents are ``x = (1 − σ)·data + σ·noise``. The transformer predicts ``v = noise − data``, which is
a prediction ``m = x − σ·v`` of the data. In λ = log((1 − σ)/σ), the exact way from σ to the next level σ' is
(DPM-Solver++, arXiv 2211.01095, Proposition 4.1; its factor α'·(1 − e^−h) is 1 − σ'/σ for flow matching)::

    x' = (σ'/σ)·x + (1 − σ'/σ)·m̄        with m̄ the mean of m over the step, weighted by e^λ

The solvers differ only in how they estimate m̄ from the predictions that they have:

=========  ==================================================================================================
``euler``  m̄ = m at the start of the step
``dpm++``  m̄ on the line through the last two predictions, halfway along the step (2M, the midpoint rule)
``unipc``  the same; then, when the prediction at the end of the step is there, the step is done once more with it:
           m̄ on the parabola through three predictions (UniPC, arXiv 2302.04867, order 2, bh2)
=========  ==================================================================================================

Every weight is a Python float, computed in double precision on the host, so no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import RequestError

Solver = Literal["unipc", "dpm++", "euler"]
SigmaGrid = Literal["official", "diffusers"]

_TRAIN_TIMESTEPS = 1000


def make_sampler(solver: Solver, steps: int, shift: float, *, sigma_grid: SigmaGrid = "official") -> Sampler:
    """Return a sampler for one run of `steps` steps.

    Args:
        solver: one of ``unipc``, ``dpm++`` (both of order 2) and ``euler``.
        steps: how often the transformer will be asked, from 1 on.
        shift: moves the levels towards noise; σ becomes shift·σ / (1 + (shift − 1)·σ).
        sigma_grid: ``official`` for the levels of the original Wan2.1 (which has no Euler; it gets those of ``dpm++``),
            ``diffusers`` for those of ``UniPCMultistepScheduler``, ``DPMSolverMultistepScheduler`` (both with
            ``use_flow_sigmas``) and ``FlowMatchEulerDiscreteScheduler``.

    Raises:
        RequestError: a name is unknown, or no grid of that many steps exists for this shift.
    """
    _require_name("solver", solver, get_args(Solver))
    _require_name("sigma grid", sigma_grid, get_args(SigmaGrid))
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise RequestError(f"steps is {steps!r}; it has to be a whole number from 1 on")
    if not (math.isfinite(shift) and shift > 0):
        raise RequestError(f"shift is {shift!r}; it has to be a number above 0 (1 leaves the levels as they are)")
    with np.errstate(divide="ignore", invalid="ignore"):  # an extreme shift is refused below
        levels, timesteps = _GRIDS[sigma_grid, solver](steps, shift)
    sigmas = torch.from_numpy(np.append(levels, 0.0).astype(np.float32))
    if not bool((sigmas.diff() < 0).all()):
        raise RequestError(
            f"with {steps} steps and shift {shift} two levels of noise are the same number in float32; "
            "take fewer steps, or a shift nearer to 1"
        )
    return _SAMPLERS[solver](sigmas, timesteps)


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Draw the float32 noise that a video starts from, `[C, T, h, w]`, on the CPU: a seed means it on every device.

    Raises:
        RequestError: the seed does not fit 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise RequestError(f"seed is {seed}; it has to be at least 0 and less than 2**64")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Return ``uncond + scale·(cond − uncond)``, in float32 at least: classifier-free guidance, arXiv 2207.12598."""
    dtype = torch.promote_types(cond.dtype, torch.float32)
    base = uncond.to(dtype)
    return torch.add(base, cond.to(dtype) - base, alpha=scale)


class Sampler:
    """One run from noise to data; made by :func:`make_sampler`, and used up by `len(sampler)` calls of :meth:`step`.

    Attributes:
        sigmas: levels of noise, float32 `[steps + 1]`, falling; the last is 0.
        timesteps: what the transformer is given at each step, `[steps]`; int64 (Euler on the diffusers grid: float32).
        index: steps done.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor) -> None:
        self.sigmas = sigmas
        self.timesteps = timesteps
        self.index = 0
        self._levels: list[float] = sigmas.tolist()
        self._shape: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """Return the latents at the next level.

        Args:
            velocity: what the transformer predicted for `latents` and ``timesteps[index]``; any floating dtype.
            latents: what the last step returned, the noise at first; float32 (or float64), any shape.

        Raises:
            RequestError: all steps are done, the two differ in shape, the shape is not that of the last step, or the
                latents are of a lower precision.
        """
        self._check(velocity, latents)
        data = torch.add(latents, velocity.to(latents.dtype), alpha=-self._levels[self.index])
        result = self._solve(data, latents)
        self.index += 1
        return result

    def _check(self, velocity: Tensor, latents: Tensor) -> None:
        if self.index >= len(self):
            raise RequestError(f"all {len(self)} steps are done; make a new sampler for another run")
        if velocity.shape != latents.shape:
            raise RequestError(f"the velocity is {list(velocity.shape)}, the latents are {list(latents.shape)}")
        if latents.shape != (self._shape or latents.shape):
            raise RequestError(f"the latents are {list(latents.shape)}, they were {list(self._shape or ())} before")
        if latents.dtype not in (torch.float32, torch.float64):
            raise RequestError(f"the latents are {latents.dtype}; steps need torch.float32, or they lose what they add")
        self._shape = latents.shape

    def _solve(self, data: Tensor, latents: Tensor) -> Tensor:
        """Euler; the others override it."""
        return self._advance(self.index, latents, data)

    def _advance(self, index: int, latents: Tensor, mean: Tensor) -> Tensor:
        """Return the latents a level further than `index`, given the mean prediction over the step."""
        return torch.lerp(mean, latents, self._levels[index + 1] / self._levels[index])

    def _width(self, index: int) -> float:
        """How far step `index` goes in λ; infinite from σ = 1 and to σ = 0."""
        return _lambda(self._levels[index + 1]) - _lambda(self._levels[index])


class _Midpoint(Sampler):
    """DPM-Solver++(2M): the first step and the last are of order 1, those between of order 2."""

    def __init__(self, sigmas: Tensor, timesteps: Tensor) -> None:
        super().__init__(sigmas, timesteps)
        self._history: list[Tensor] = []  # the predictions at the levels before this one, the latest last

    def _solve(self, data: Tensor, latents: Tensor) -> Tensor:
        mean = self._halfway(data) if 0 < self.index < len(self) - 1 else data
        self._history = [*self._history[-1:], data]
        return self._advance(self.index, latents, mean)

    def _halfway(self, data: Tensor) -> Tensor:
        """Extrapolate the line through the last two predictions to the middle of the step."""
        # From σ = 1 the step before was infinitely wide: the line is flat, the order 1.
        return torch.lerp(data, self._history[-1], -self._width(self.index) / self._width(self.index - 1) / 2)


class _UniPC(_Midpoint):
    """The midpoint rule as predictor, and a corrector that repeats each step with the prediction at its end."""

    _start: Tensor  # the corrected latents at the level before this one

    def _solve(self, data: Tensor, latents: Tensor) -> Tensor:
        # The first latents are the caller's own, who may write into them before the next step.
        self._start = self._corrected(data) if self.index > 0 else latents.clone()
        return super()._solve(data, self._start)

    def _corrected(self, data: Tensor) -> Tensor:
        """Do the last step once more, `data` being the prediction at its end."""
        if self.index == 1:
            mean = torch.lerp(self._history[-1], data, 0.5)
        else:
            mean = self._parabola_mean(data)
        return self._advance(self.index - 1, self._start, mean)

    def _parabola_mean(self, data: Tensor) -> Tensor:
        h = self._width(self.index - 1)
        before, at_start, at_end = parabola_weights(h, -self._width(self.index - 2) / h)
        mean = torch.mul(data, at_end)
        return mean.add_(self._history[-1], alpha=at_start).add_(self._history[-2], alpha=before)


def parabola_weights(h: float, r: float) -> tuple[float, float, float]:
    """Return the weights of the values at θ = r, 0 and 1 in the mean, weighted by e^(hθ), of a parabola over [0, 1].

    θ is the part of the step that is done, h its width in λ, and r < 0 where the step before began. The weights are
    exact for polynomials of degree 0, 1 and 2: they add up to 1, give the mean of θ, and give the mean of θ². (UniPC
    states the last two as the system R·ρ = b.)
    """
    first = 1 / -math.expm1(-h) - 1 / h  # the mean of θ
    second = 1 / -math.expm1(-h) - 2 / h * first  # the mean of θ²
    curve = (second - first) / (r - 1)
    before, at_end = curve / r, first - curve
    return before, 1 - before - at_end, at_end


def _lambda(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio, −∞ for pure noise and ∞ for data."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)


# ---- the grids: levels without the last 0, in float64, and timesteps -----------------------------------------------

_Levels = NDArray[np.floating[Any]]


def _shifted(sigma: _Levels, shift: float) -> _Levels:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _truncated(sigma: _Levels) -> Tensor:
    return torch.from_numpy((sigma * _TRAIN_TIMESTEPS).astype(np.int64))


def _from_noise(steps: int, shift: float) -> tuple[_Levels, Tensor]:
    """The original's for DPM++: evenly from 1 to 0, then shifted."""
    sigma = _shifted(np.linspace(1, 0, steps + 1)[:-1], shift)
    return sigma, _truncated(sigma)


def _from_999(steps: int, shift: float) -> tuple[_Levels, Tensor]:
    """The original's for UniPC: evenly from the last of its 1000 training levels, kept as a float32, to 0."""
    sigma = _shifted(np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1], shift)
    return sigma, _truncated(sigma)


def _diffusers_unipc(steps: int, shift: float) -> tuple[_Levels, Tensor]:
    """Evenly from 1 to 1/1000 without the last; the first is moved off 1, where λ is infinite."""
    sigma = _shifted(np.linspace(1, 1 / _TRAIN_TIMESTEPS, steps + 1)[:-1], shift)
    sigma[0] -= 1e-6
    return sigma, _truncated(sigma)


def _diffusers_midpoint(steps: int, shift: float) -> tuple[_Levels, Tensor]:
    """Evenly from 999/1000 to 0 without the last, as the complement of what is evenly between 1 and 1/1000."""
    sigma = _shifted(1 - np.linspace(1, 1 / _TRAIN_TIMESTEPS, steps + 1)[:0:-1], shift)
    return sigma, _truncated(sigma)


def _diffusers_euler(steps: int, shift: float) -> tuple[_Levels, Tensor]:
    """Evenly from 1 to the shifted 1/1000, and shifted again: diffusers applies the shift twice."""
    lowest = _shifted(np.array([1 / _TRAIN_TIMESTEPS], dtype=np.float32), shift).item()
    sigma = _shifted(np.linspace(_TRAIN_TIMESTEPS, lowest * _TRAIN_TIMESTEPS, steps) / _TRAIN_TIMESTEPS, shift)
    return sigma, torch.from_numpy(sigma.astype(np.float32) * np.float32(_TRAIN_TIMESTEPS))


_GRIDS = {
    ("official", "unipc"): _from_999,
    ("official", "dpm++"): _from_noise,
    ("official", "euler"): _from_noise,
    ("diffusers", "unipc"): _diffusers_unipc,
    ("diffusers", "dpm++"): _diffusers_midpoint,
    ("diffusers", "euler"): _diffusers_euler,
}
_SAMPLERS = {"unipc": _UniPC, "dpm++": _Midpoint, "euler": Sampler}


def _require_name(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise RequestError(f"{given!r} is no {what}; there are {', '.join(known)}")
