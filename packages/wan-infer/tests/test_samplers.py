"""The samplers against the papers' own form of the updates, against diffusers, and against a flow with a known end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan_infer.errors import RequestError
from wan_infer.samplers import Sampler, SigmaGrid, Solver, draw_noise, guide, make_sampler, parabola_weights

Array = NDArray[np.float64]
Velocity = Callable[[float, Tensor], Tensor]

SOLVERS: tuple[Solver, ...] = get_args(Solver)
GRIDS: tuple[SigmaGrid, ...] = get_args(SigmaGrid)
RUNS = [(1, 5.0), (2, 1.0), (3, 8.0), (10, 3.0), (20, 5.0), (50, 5.0), (50, 1.0), (100, 16.0)]


# ---- the updates as the papers write them, in double precision ------------------------------------------------------


def _euler(sigmas: Sequence[float], velocities: Array, x: Array) -> list[Array]:
    """x + (σ' − σ)·v."""
    path = []
    for now, after, v in zip(sigmas[:-1], sigmas[1:], velocities, strict=True):
        x = x + (after - now) * v
        path.append(x)
    return path


def _log_snr(sigma: float) -> float:
    with np.errstate(divide="ignore"):
        return float(np.log(np.float64(1 - sigma)) - np.log(np.float64(sigma)))


def _dpm(sigmas: Sequence[float], velocities: Array, x: Array) -> list[Array]:
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095 with r = h_before/h, of order 1 at both ends."""
    steps, path = len(velocities), []
    m_before, h_before = x, math.inf
    for i in range(steps):
        m = x - sigmas[i] * velocities[i]
        h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
        d = m if i in (0, steps - 1) else m + (m - m_before) / (2 * (h_before / h))
        x = sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * math.expm1(-h) * d
        m_before, h_before = m, h
        path.append(x)
    return path


def _unipc(sigmas: Sequence[float], velocities: Array, x: Array) -> list[Array]:
    """UniPC-2 with B₂ for data prediction, arXiv 2302.04867: ρ from the system R·ρ = b, ½ where it is of size 1."""
    steps, path = len(velocities), []
    lam = [_log_snr(sigma) for sigma in sigmas]
    start, predictions = x, list[Array]()
    for i in range(steps):
        predictions.append(x - sigmas[i] * velocities[i])
        if i > 0:
            h = lam[i] - lam[i - 1]
            b = math.expm1(-h)
            base = sigmas[i] / sigmas[i - 1] * start - (1 - sigmas[i]) * b * predictions[i - 1]
            d_end = predictions[i] - predictions[i - 1]
            change = d_end / 2
            if i > 1:
                r = (lam[i - 2] - lam[i - 1]) / h
                phi_2 = b / -h - 1
                phi_3 = phi_2 / -h - 1 / 2
                rho = np.linalg.solve(np.array([[1, 1], [r, 1]]), np.array([phi_2 / b, 2 * phi_3 / b]))
                change = rho[0] * (predictions[i - 2] - predictions[i - 1]) / r + rho[1] * d_end
            x = base - (1 - sigmas[i]) * b * change
        start = x
        h = lam[i + 1] - lam[i]
        b = math.expm1(-h)
        x = sigmas[i + 1] / sigmas[i] * start - (1 - sigmas[i + 1]) * b * predictions[i]
        if 0 < i < steps - 1:
            d = (predictions[i - 1] - predictions[i]) / ((lam[i - 1] - lam[i]) / h)
            x = x - (1 - sigmas[i + 1]) * b * d / 2
        path.append(x)
    return path


REFERENCES = {"euler": _euler, "dpm++": _dpm, "unipc": _unipc}


def _random_run(steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(steps)
    velocities = torch.randn(steps, 4, 50, generator=generator)
    return velocities.to(dtype), torch.randn(4, 50, generator=generator).to(dtype)


def _walk(sampler: Sampler, velocities: Tensor, latents: Tensor) -> list[Tensor]:
    path = []
    for velocity in velocities:
        latents = sampler.step(velocity, latents)
        path.append(latents)
    return path


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_random_velocities_lead_where_the_papers_formulas_lead(
    solver: Solver, steps: int, shift: float, grid: SigmaGrid
) -> None:
    for dtype, single, whole in ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-6, 5e-5)):
        sampler = make_sampler(solver, steps, shift, sigma_grid=grid)
        velocities, latents = _random_run(steps, dtype)
        path = torch.stack(_walk(sampler, velocities, latents)).double().numpy()
        expected = REFERENCES[solver](sampler.sigmas.tolist(), velocities.double().numpy(), latents.double().numpy())
        assert np.abs(path[0] - expected[0]).max() <= single
        assert np.abs(path - expected).max() <= whole


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_each_step_alone_is_right_to_a_millionth(solver: Solver, steps: int) -> None:
    sampler = make_sampler(solver, steps, 5.0)
    velocities, latents = _random_run(steps, torch.float32)
    path = torch.stack(_walk(sampler, velocities, latents)).double().numpy()
    expected = REFERENCES[solver](sampler.sigmas.tolist(), velocities.double().numpy(), latents.double().numpy())
    assert np.abs(path - expected).max(axis=(1, 2)).tolist() == pytest.approx([0.0] * steps, abs=1e-6)


@pytest.mark.parametrize(("h", "r"), [(0.05, -1.0), (0.7, -0.4), (3.0, -2.5), (8.0, -0.1)])
def test_the_weights_integrate_a_parabola_exactly(h: float, r: float) -> None:
    nodes, gauss = np.polynomial.legendre.leggauss(40)
    theta = (nodes + 1) / 2
    density = gauss / 2 * np.exp(h * (theta - 1))
    parabola = np.polynomial.Polynomial([0.3, -1.7, 2.9])
    mean = (density * parabola(theta)).sum() / density.sum()
    before, at_start, at_end = parabola_weights(h, r)
    assert before * parabola(r) + at_start * parabola(0.0) + at_end * parabola(1.0) == pytest.approx(mean, abs=1e-11)


# ---- the order of convergence ---------------------------------------------------------------------------------------

MEAN, SPREAD = 0.7, 0.6


def _gaussian_velocity(sigma: float, x: Tensor) -> Tensor:
    """The true velocity when the data are normal: noise minus data, both as expected at `x`."""
    data = MEAN + (1 - sigma) * SPREAD**2 / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2) * (x - (1 - sigma) * MEAN)
    return (x - data) / sigma


def _error(solver: Solver, steps: int, grid: SigmaGrid) -> float:
    """How far the end is from the true one: the flow keeps the distance from the mean in standard deviations."""
    sampler = make_sampler(solver, steps, 3.0, sigma_grid=grid)
    first = float(sampler.sigmas[0])
    deviations = torch.linspace(-2, 2, 5, dtype=torch.float64)
    latents = (1 - first) * MEAN + math.sqrt((1 - first) ** 2 * SPREAD**2 + first**2) * deviations
    for sigma in sampler.sigmas[:-1].tolist():
        latents = sampler.step(_gaussian_velocity(sigma, latents), latents)
    return float((latents - (MEAN + SPREAD * deviations)).abs().max())


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)], ids=["euler", "dpm++", "unipc"]
)
def test_the_error_falls_with_the_order_of_the_solver(solver: Solver, order: int) -> None:
    # The grid is even in σ, so the steps near noise stay wide in λ: the midpoint rule's error falls like N⁻²·log N.
    coarse, fine = _error(solver, 500, "official"), _error(solver, 1000, "official")
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def test_the_corrector_pays() -> None:
    assert _error("unipc", 20, "official") < _error("dpm++", 20, "official") < _error("euler", 20, "official")


# ---- the grids ------------------------------------------------------------------------------------------------------

# The original keeps the levels of its UniPC as float32 before it spaces them.
FIRST = {"unipc": Fraction(float(np.float32(0.999))), "dpm++": Fraction(1), "euler": Fraction(1)}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [1, 3, 5, Fraction(17, 2), 12, 16])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 40, 50, 100])
def test_the_official_grid(solver: Solver, steps: int, shift: Fraction) -> None:
    sampler = make_sampler(solver, steps, float(shift))
    even = [FIRST[solver] * (steps - i) / steps for i in range(steps + 1)]
    sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
    assert sampler.sigmas.dtype == torch.float32
    assert sampler.sigmas.tolist() == pytest.approx([float(sigma) for sigma in sigmas], abs=1e-7)
    assert sampler.timesteps.dtype == torch.int64
    assert len(sampler) == len(sampler.timesteps) == steps
    for timestep, sigma in zip(sampler.timesteps.tolist(), sigmas[:-1], strict=True):
        exact = 1000 * sigma
        # The original truncates a float64: where the exact value is whole, rounding may have left it just below.
        assert timestep == math.floor(exact) or (exact.denominator == 1 and timestep == exact - 1)


def test_the_official_grid_in_published_numbers() -> None:
    sampler = make_sampler("unipc", 50, 5.0)
    sigmas = sampler.sigmas[[0, 1, 2, 49, 50]].tolist()
    assert sigmas == pytest.approx([0.99980, 0.99573, 0.99153, 0.09251, 0], abs=5e-6)
    assert sampler.timesteps[[0, 1, 2, 49]].tolist() == [999, 995, 991, 92]
    assert make_sampler("dpm++", 50, 5.0).timesteps[0] == 1000


def test_timesteps_that_repeat_are_steps_all_the_same() -> None:
    sampler = make_sampler("unipc", 100, 16.0)
    assert len(set(sampler.timesteps.tolist())) < 100
    velocities, latents = _random_run(100, torch.float32)
    assert torch.isfinite(_walk(sampler, velocities, latents)[-1]).all()


# ---- diffusers ------------------------------------------------------------------------------------------------------


def _peer(solver: Solver, shift: float) -> Any:
    import diffusers

    schedulers: Any = diffusers
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    if solver == "unipc":
        return schedulers.UniPCMultistepScheduler(**flow)
    if solver == "dpm++":
        return schedulers.DPMSolverMultistepScheduler(**flow)
    return schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)


# diffusers' DPM++ scheduler calls NumPy functions on tensors, in the way that NumPy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_the_diffusers_grid_gives_what_diffusers_gives(solver: Solver, steps: int, shift: float) -> None:
    sampler, peer = make_sampler(solver, steps, shift, sigma_grid="diffusers"), _peer(solver, shift)
    peer.set_timesteps(steps)
    peer.set_begin_index(0)  # or it looks its place up by the timestep, which may be there twice
    assert torch.equal(sampler.sigmas, peer.sigmas)
    assert torch.equal(sampler.timesteps, peer.timesteps)
    velocities, theirs = _random_run(steps, torch.float32)
    ours = theirs
    for timestep, velocity in zip(peer.timesteps, velocities, strict=True):
        theirs = peer.step(velocity, timestep, theirs, return_dict=False)[0]
        ours = sampler.step(velocity, ours)
        assert (ours - theirs).abs().max() <= 5e-5


# ---- how it behaves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_step_reads_from_the_device(solver: Solver) -> None:
    sampler = make_sampler(solver, 4, 5.0)
    latents = torch.empty(2, 3, device="meta")  # holds no values: whatever would read one fails
    for _ in range(4):
        latents = sampler.step(torch.empty(2, 3, device="meta"), latents)
    assert latents.dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_callers_tensors_stay_the_callers(solver: Solver) -> None:
    velocities, noise = _random_run(5, torch.float32)
    expected = _walk(make_sampler(solver, 5, 5.0), velocities, noise)
    sampler = make_sampler(solver, 5, 5.0)
    latents = noise.clone()
    for velocity, right in zip(velocities, expected, strict=True):
        given_velocity, given, before = velocity.clone(), latents.clone(), latents
        latents = sampler.step(given_velocity, given)
        assert torch.equal(given, before)
        assert torch.equal(given_velocity, velocity)
        assert torch.equal(latents, right)
        given.fill_(math.nan)
        given_velocity.fill_(math.nan)


def test_a_velocity_in_bfloat16_is_taken() -> None:
    latents = make_sampler("unipc", 1, 5.0).step(torch.ones(3, dtype=torch.bfloat16), torch.ones(3))
    assert latents.dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_step_ends_at_the_predicted_data(solver: Solver) -> None:
    sampler = make_sampler(solver, 1, 5.0)
    velocity, noise = torch.randn(2, 8).unbind()
    assert torch.allclose(sampler.step(velocity, noise), noise - sampler.sigmas[0] * velocity, atol=1e-7)
    assert sampler.index == len(sampler) == 1


def test_noise_depends_on_the_seed_alone() -> None:
    noise = draw_noise([16, 2, 4, 6], 42)
    assert noise.shape == (16, 2, 4, 6)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(42)))
    assert not torch.equal(noise, draw_noise([16, 2, 4, 6], 2**64 - 1))


def test_guidance_starts_at_the_unconditional_velocity() -> None:
    cond, uncond = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert guide(cond, uncond, 5.0).tolist() == [11.0, -9.0]
    assert guide(cond, uncond, 0.0).tolist() == uncond.tolist()
    assert guide(cond.bfloat16(), uncond.bfloat16(), 1.0).dtype == torch.float32


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "ddim"}, "'ddim' is no solver; there are unipc, dpm\\+\\+, euler"),
        ({"sigma_grid": "karras"}, "'karras' is no sigma grid; there are official, diffusers"),
        ({"steps": 0}, "steps is 0; it has to be a whole number from 1 on"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"shift": 0.0}, "shift is 0.0; it has to be a number above 0"),
        ({"shift": -3.0}, "shift is -3.0"),
        ({"shift": math.nan}, "shift is nan"),
        ({"shift": math.inf}, "shift is inf"),
        ({"shift": 1e9}, "with 4 steps and shift 1000000000.0 two levels of noise are the same number in float32"),
        ({"solver": "euler", "shift": 1e-60}, "two levels of noise are the same"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments: dict[str, Any], message: str) -> None:
    legal: dict[str, Any] = {"solver": "unipc", "steps": 4, "shift": 5.0}
    with pytest.raises(RequestError, match=message):
        make_sampler(**legal | arguments)


def test_a_step_after_the_last_is_refused() -> None:
    sampler = make_sampler("unipc", 1, 5.0)
    sampler.step(torch.zeros(3), torch.zeros(3))
    with pytest.raises(RequestError, match="all 1 steps are done; make a new sampler"):
        sampler.step(torch.zeros(3), torch.zeros(3))


def test_tensors_that_do_not_fit_are_refused_and_change_nothing() -> None:
    sampler = make_sampler("dpm++", 3, 5.0)
    sampler.step(torch.zeros(3), torch.zeros(3))
    with pytest.raises(RequestError, match=r"the velocity is \[2\], the latents are \[3\]"):
        sampler.step(torch.zeros(2), torch.zeros(3))
    with pytest.raises(RequestError, match=r"the latents are \[1, 3\], they were \[3\] before"):
        sampler.step(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(RequestError, match=r"the latents are torch.bfloat16; steps need torch.float32"):
        sampler.step(torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16))
    assert sampler.index == 1


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(RequestError, match=f"seed is {seed}; it has to be at least 0"):
        draw_noise([1], seed)
