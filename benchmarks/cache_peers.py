"""What `cache_pareto.py` runs: one network, one loop, and everything that other people's libraries can do to it.

A `Method` begins every generation by its `start(run)`, which may change `run.network` (a fresh copy, thrown away
afterwards), enter contexts on `run.stack`, and returns a hook: ``hook(predict, latents, index)`` gives the guided
velocity of one step, and `predict()` asks the network for it, first with the prompt, then without. Peers change the
network and keep the plain hook; what works at the level of the solver leaves the network alone.
"""

from __future__ import annotations

import ast
import copy
import functools
import io
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from wan_infer import Sampler, WanPipeline, WanVae, draw_noise, guide, load_prompt_encoder, make_sampler, wan_mini
from wan_infer.mini.clips import DIRECTIONS
from wan_infer.samplers import Solver

GUIDANCE, SHIFT = 5.0, 5.0
LATENTS = (16, 5, 8, 8)  # of wan-mini: 17 frames of 64 × 64
CALIBRATION, VALIDATION = 8, 8  # (prompt, seed) pairs that no test sees, nor any prompt of them

Predict = Callable[[], Tensor]
Hook = Callable[[Predict, Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One video to generate."""

    digit: int
    direction: str
    seed: int

    @property
    def prompt(self) -> str:
        """What the network is told."""
        return f"the digit {self.digit} moves {self.direction}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generation, before its first step.

    Attributes:
        network: diffusers' transformer, of this run alone.
        sampler: ``sigmas``, ``timesteps`` and, as it goes, ``index``.
        stack: what is entered here is left after the last step.
    """

    network: Any
    sampler: Sampler
    stack: ExitStack

    @property
    def timestep(self) -> float:
        """Of the step that is being done, from 1000 down."""
        return float(self.sampler.timesteps[self.sampler.index])


Start = Callable[[Run], Hook]


def plain(run: Run) -> Hook:
    """Compute every step."""
    return lambda predict, latents, index: predict()


@dataclass(frozen=True, kw_only=True)
class Method:
    """One setting of one way to save compute.

    Attributes:
        family: settings of one family lie on one front.
        setting: within the family.
        side: whose it is; a crash is recorded if it is a peer's, and an error otherwise.
        start: begins a generation.
        steps: of the sampler, if not those of the reference.
    """

    family: str
    setting: str
    side: Literal["control", "peer", "ours"]
    start: Start = plain
    steps: int | None = None

    @property
    def name(self) -> str:
        """Unique, and what `--methods` filters."""
        return f"{self.family} {self.setting}".strip()


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The network, how it is sampled, and three sets of samples that share neither prompt nor seed.

    Attributes:
        network: diffusers' transformer with the weights of wan-mini; no run changes it.
        vae: ours, for looking at results.
        texts: embeddings of every prompt, [1, 64, 64]; "" is the negative one.
        solver, steps: of the reference.
        calibration, validation, test: methods that must be fitted may see the first two.
    """

    network: Any = field(repr=False)
    vae: WanVae = field(repr=False)
    texts: Mapping[str, Tensor] = field(repr=False)
    solver: Solver
    steps: int
    calibration: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def sampler(self, steps: int | None = None) -> Sampler:
        """A fresh one."""
        return make_sampler(self.solver, steps or self.steps, SHIFT)

    @torch.inference_mode()
    def generate(
        self,
        sample: Sample,
        start: Start = plain,
        *,
        steps: int | None = None,
        meter: AbstractContextManager[object] | None = None,
    ) -> tuple[Tensor, float]:
        """Return latents [1, 16, 5, 8, 8] and the seconds that the steps took; `meter` is entered around them.

        What `start` does, calibration and search included, is neither timed nor metered.
        """
        latents = draw_noise(LATENTS, sample.seed)[None]
        with ExitStack() as stack:
            run = Run(network=copy.deepcopy(self.network), sampler=self.sampler(steps), stack=stack)
            hook = start(run)
            stack.enter_context(meter or nullcontext())
            started = time.perf_counter()
            for index, timestep in enumerate(run.sampler.timesteps):
                predict = functools.partial(self._predict, run.network, latents, timestep, sample.prompt)
                latents = run.sampler.step(hook(predict, latents, index), latents)
            return latents, time.perf_counter() - started

    def _predict(self, network: Any, latents: Tensor, timestep: Tensor, prompt: str) -> Tensor:
        """The guided velocity, from two forwards as diffusers' own pipeline has them."""

        def velocity(branch: str, words: str) -> Tensor:
            with network.cache_context(branch):
                out: Tensor = network(latents, timestep.float().expand(1), self.texts[words], return_dict=False)[0]
            return out

        return guide(velocity("cond", prompt), velocity("uncond", ""), GUIDANCE)


def load(*, solver: Solver, steps: int, samples: int) -> Problem:
    """Read wan-mini, and draw `samples` test pairs beside those of calibration and validation."""
    calibration, validation, test = _draw(samples)
    pipe = WanPipeline.from_pretrained(wan_mini(), device="cpu", dtype=torch.float32)
    rows = pipe.config.text_len
    encoder = load_prompt_encoder(wan_mini(), dtype=torch.float32, text_len=rows)

    def embed(text: str) -> Tensor:
        embedded = encoder.encode_prompts([text])[0]
        return torch.nn.functional.pad(embedded, (0, 0, 0, rows - embedded.shape[1]))

    texts = {sample.prompt: embed(sample.prompt) for sample in (*calibration, *validation, *test)}
    texts[""] = embed(pipe.task.negative_prompt)
    return Problem(
        network=_network(),
        vae=pipe.vae,
        texts=texts,
        solver=solver,
        steps=steps,
        calibration=calibration,
        validation=validation,
        test=test,
    )


def _network() -> Any:
    """The weights of wan-mini in diffusers' class (whose `from_pretrained` needs accelerate for float32)."""
    from safetensors.torch import load_file

    folder = wan_mini() / "transformer"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    peer = _diffusers().WanTransformer3DModel
    network = peer(**{key: value for key, value in config.items() if key[0] != "_" and key != "text_len"})
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return network.eval().requires_grad_(False)


def _draw(samples: int) -> tuple[tuple[Sample, ...], ...]:
    """Calibration, validation and test; the test goes round the prompts that are left, with new seeds."""
    prompts = list(product(range(10), DIRECTIONS))
    random.Random(0).shuffle(prompts)
    kept = CALIBRATION + VALIDATION
    left = prompts[kept:]
    chosen = prompts[:kept] + [left[number % len(left)] for number in range(samples)]
    drawn = tuple(Sample(digit=d, direction=way, seed=2_000_000 + n) for n, (d, way) in enumerate(chosen))
    return drawn[:CALIBRATION], drawn[CALIBRATION:kept], drawn[kept:]


# ---- controls: what anybody can do without a library ----------------------------------------------------------------

BUDGETS = (0.23, 0.27, 0.33, 0.4, 0.5, 0.6, 0.7, 0.8)


def controls(problem: Problem) -> list[Method]:
    """Fewer steps, and masks at even distances, from the first step or after three (W3), with ways to fill the gaps."""
    made = []
    for budget in BUDGETS:
        count = round(budget * problem.steps)
        setting = f"{count}/{problem.steps}"
        made.append(Method(family="fewer steps", setting=setting, side="control", steps=count))
        for suffix, warm, linear in (("reuse", 1, False), ("linear", 1, True), ("linear W3", 3, True)):
            start = masked(_even(problem.steps, count, warm), linear=linear)
            made.append(Method(family=f"uniform {suffix}", setting=setting, side="control", start=start))
    return made


def _even(steps: int, count: int, warm: int) -> set[int]:
    """The first `warm` steps, and the rest of `count` at even distances up to the last."""
    gap = (steps - warm) / (count - warm)
    return {*range(warm), *(round(warm - 1 + number * gap) for number in range(1, count - warm + 1))}


def masked(computed: set[int], *, linear: bool) -> Start:
    """Compute the steps named; else take the last velocity, or the line through the last two over σ."""

    def start(run: Run) -> Hook:
        known: list[tuple[float, Tensor]] = []

        def hook(predict: Predict, latents: Tensor, index: int) -> Tensor:
            sigma = float(run.sampler.sigmas[index])
            if index in computed:
                known[:] = [*known[-1:], (sigma, predict())]
            last, velocity = known[-1]
            if sigma == last or not linear or len(known) < 2:
                return velocity
            before, older = known[0]
            return torch.lerp(older, velocity, (sigma - before) / (last - before))

        return hook

    return start


# ---- peers: every one as its documentation says, at batch 1 ---------------------------------------------------------


def peers(problem: Problem) -> list[Method]:
    """All settings of cache-dit and of diffusers' own caches."""
    return [*_cache_dit_methods(problem.steps), *_diffusers_methods(problem)]


def _inside(install: Callable[[Run], object]) -> Start:
    """What lives inside the network, beside the plain hook."""

    def start(run: Run) -> Hook:
        install(run)
        return plain(run)

    return start


def _peer(family: str, setting: object, install: Callable[[Run], object]) -> Method:
    return Method(family=family, setting=str(setting), side="peer", start=_inside(install))


THRESHOLDS = (0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4)


def _cache_dit_methods(steps: int) -> list[Method]:
    install = functools.partial(functools.partial, _install_cache_dit, steps)
    made = []
    for order, suffix in ((0, ""), (1, "+TaylorSeer1")):
        for threshold in THRESHOLDS:
            made.append(_peer(f"cache-dit F1B0W3{suffix}", threshold, install(order, threshold, None)))
        for mask in ("slow", "medium", "fast", "ultra"):
            made.append(_peer(f"cache-dit SCM{suffix}", mask, install(order, None, mask)))
    return made


def _install_cache_dit(steps: int, order: int, threshold: float | None, mask: str | None, run: Run) -> None:
    library = _cache_dit()
    # Without a mask the first block decides; with one, its policy "static" asks nothing but the mask.
    when: dict[str, Any] = {"residual_diff_threshold": threshold}
    if mask is not None:
        computed = library.steps_mask(mask_policy=mask, total_steps=steps)
        when = {"steps_computation_mask": computed, "steps_computation_policy": "static"}
    forecast = {"calibrator_config": library.TaylorSeerCalibratorConfig(taylorseer_order=order)} if order else {}
    library.enable_cache(
        library.BlockAdapter(
            transformer=run.network,
            blocks=run.network.blocks,
            forward_pattern=library.ForwardPattern.Pattern_2,
            has_separate_cfg=True,
        ),
        cache_config=library.DBCacheConfig(
            num_inference_steps=steps, Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=3, **when
        ),
        **forecast,
    )


def _diffusers_methods(problem: Problem) -> list[Method]:
    ratios = functools.cache(functools.partial(_magnitude_ratios, problem))

    def now(run: Run) -> Callable[[], int]:
        return lambda: int(run.timestep)

    def method(family: str, setting: str, config: str, **values: Any) -> Method:
        """What is callable gets the run, and gives the value."""

        def install(run: Run) -> None:
            known = {name: value(run) if callable(value) else value for name, value in values.items()}
            run.network.enable_cache(getattr(_diffusers(), config)(**known))

        return _peer(f"diffusers {family}", setting, install)

    values: dict[str, Any]
    made = [method("FirstBlockCache", str(each), "FirstBlockCacheConfig", threshold=each) for each in THRESHOLDS]
    for threshold, longest in ((0.03, 3), (0.06, 3), (0.12, 4), (0.24, 6), (0.5, 8)):
        values = {"threshold": threshold, "max_skip_steps": longest, "num_inference_steps": problem.steps}
        setting = f"{threshold} K{longest}"
        made.append(method("MagCache", setting, "MagCacheConfig", **values, mag_ratios=lambda run: ratios()))
    made.append(method("TaylorSeer", "default", "TaylorSeerCacheConfig"))
    for interval in (2, 3, 4, 5, 6, 8):
        # Its factors are bfloat16 by default; the network is float32.
        values = {"cache_interval": interval, "use_lite_mode": True, "taylor_factors_dtype": torch.float32}
        made.append(method("TaylorSeer lite", f"every {interval}", "TaylorSeerCacheConfig", **values))
    for interval in (2, 3, 4, 6, 8):
        skips = dict.fromkeys(("spatial_attention_block_skip_range", "cross_attention_block_skip_range"), interval)
        config = "PyramidAttentionBroadcastConfig"
        made.append(method("PAB", f"every {interval}", config, **skips, current_timestep_callback=now))
    made.append(method("FasterCache", "default", "FasterCacheConfig", current_timestep_callback=now))
    return made


def _magnitude_ratios(problem: Problem) -> Sequence[float]:
    """One run of calibration, whose result diffusers prints for copying; that of the prompt's branch comes first."""
    config = _diffusers().MagCacheConfig(calibrate=True, num_inference_steps=problem.steps)
    printed = io.StringIO()
    with redirect_stdout(printed):
        problem.generate(problem.calibration[0], _inside(lambda run: run.network.enable_cache(config)))
    found = re.search(r"^\[[-\d.e, ]+\]$", printed.getvalue(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"MagCache printed no ratios but {printed.getvalue()[:200]!r}")
    ratios: list[float] = ast.literal_eval(found[0])
    return ratios


def _diffusers() -> Any:
    """The library, without its types; imported after the arguments were read."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def _cache_dit() -> Any:
    """The library, without its types and its log of every call."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # read when it is imported
    import cache_dit

    return cache_dit
