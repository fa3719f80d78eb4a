"""Steps that are not computed, by dit-cache. Nobody else here knows it.

What a request may say in `cache`:

* a `Schedule`, or the path of its file: some velocities are predicted. ``dit-cache search wan_infer.caching:problem``
  makes one.
* ``"auto:0.4"``: such a schedule with that share of the steps, searched when there is none for these settings yet.
* a `CacheConfig`: the attention output, or the change of a range of blocks, is used again as in MindIE SD.
* a `VelocityCache`: any other policy at the solver.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_cache import (
    BlockCache,
    CacheAgent,
    CacheConfig,
    CacheError,
    CacheWarning,
    Interval,
    Ledger,
    Made,
    Schedule,
    TerminalWatch,
    VelocityCache,
    Watch,
    attach,
    model_digest,
    search,
)
from wan_infer.errors import RequestError
from wan_infer.generation import Settings
from wan_infer.samplers import draw_noise, make_sampler
from wan_infer.transformer import WanTransformer

if TYPE_CHECKING:
    from wan_infer.pipeline import WanPipeline

Cache = Schedule | CacheConfig | VelocityCache
Unverified = CacheWarning
OnSearch = Watch
CacheWish = Cache | str | Path | None

SIDES = ("cond", "uncond")  # of the guidance
_AUTO = "auto:"


class Uncached:
    """Every step of a generation, computed."""

    ledger: Ledger | None = None

    @property
    def computed(self) -> float:
        """Share of the evaluations that were computed."""
        return 1.0 if self.ledger is None else self.ledger.share

    def velocity(self, predict: Callable[[], Tensor], latents: Tensor) -> Tensor:
        """Return the velocity after guidance; `predict` computes it."""
        return predict()

    def side(self, index: int, name: str) -> AbstractContextManager[object]:
        """Stand around one call of the transformer."""
        return nullcontext()


class _Velocities(Uncached):
    """Velocities are predicted."""

    def __init__(self, cache: VelocityCache) -> None:
        self._cache = cache

    def velocity(self, predict: Callable[[], Tensor], latents: Tensor) -> Tensor:
        self.ledger = self._cache.ledger
        return self._cache.velocity(predict, latents)


class _Blocks(Uncached):
    """Something inside the transformer is used again."""

    def __init__(self, cache: BlockCache) -> None:
        self._cache = cache

    def side(self, index: int, name: str) -> AbstractContextManager[object]:
        self.ledger = self._cache.ledger
        return self._cache.at(index, name)


@contextmanager
def cached(
    cache: Cache | None, transformer: WanTransformer, sigmas: Sequence[float], settings: Settings
) -> Iterator[Uncached]:
    """One generation with what `read_wish` returned.

    Args:
        cache: what is to be done.
        transformer: what it is done to; it is as before afterwards.
        sigmas: noise levels of the steps and of the end.
        settings: of the run; a schedule is held against them.

    Raises:
        RequestError: it does not fit this model or these steps.
    """
    with ExitStack() as stack:
        if cache is None or (isinstance(cache, CacheConfig) and _checked(cache).idle):
            yield Uncached()
        elif isinstance(cache, CacheConfig):
            blocks = stack.enter_context(_attached(cache, transformer, len(sigmas) - 1))
            stack.enter_context(blocks.generation(sigmas))
            yield _Blocks(blocks)
        else:
            if isinstance(cache, Schedule):
                with _explained():
                    cache = cache.adapted(sigmas, made_of(transformer, settings)).cache()
            stack.enter_context(cache.generation(sigmas))
            yield _Velocities(cache)


def read_wish(wish: CacheWish) -> Cache | float | None:
    """Return what a wish means: the cache, or the share of the steps of ``auto:SHARE``.

    Raises:
        RequestError: it is no share, or there is no such file, or that is no schedule.
    """
    if isinstance(wish, VelocityCache) and "signal" in wish.policy.needs:
        raise RequestError(f"{type(wish.policy).__name__} looks at the timestep, which is not seen here; take another")
    if not isinstance(wish, str | Path):
        return wish
    if not str(wish).startswith(_AUTO):
        with _explained():
            return Schedule.load(wish)
    try:
        share = float(str(wish).removeprefix(_AUTO))
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise RequestError(f"the cache is {wish!r}; auto: takes a share above 0 and up to 1, such as auto:0.4")
    return share


def attention_cache(blocks: int, steps: int, *, start: int, interval: int, end: int) -> CacheConfig:
    """Return the cache of ``--use_attentioncache``: outputs of self-attention are used again where
    ``start < step <= end`` and ``(step - start) % interval != 0``.

    Raises:
        RequestError: the numbers are not possible.
    """
    config = CacheConfig("attention_cache", blocks, steps, step_start=start, step_interval=interval, step_end=end)
    _checked(config)
    return config


def on_terminal() -> OnSearch:
    """Return what says on stderr what a search costs, and how far it is."""
    return TerminalWatch(
        "searching a schedule for these settings, once: this takes the time of up to {total:.0f} uncached videos, and "
        "goes on where it stopped when it is interrupted"
    )


def made_of(transformer: WanTransformer, settings: Settings) -> Made:
    """Return what a run is, in the words of a schedule."""
    digest = model_digest(transformer)
    return Made(
        model=digest,
        solver=settings.solver,
        shift=settings.shift,
        guidance=settings.guidance,
        settings={"size": list(settings.size), "frames": settings.frames},
    )


def problem(
    pipe: WanPipeline | None = None, *, ckpt_dir: str | None = None, device: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Return the arguments of `dit_cache.search` for videos of these settings.

    Args:
        pipe: a pipeline; opened when None.
        ckpt_dir: the checkpoint that is opened, wan-mini when None.
        device: where.
        settings: as those of a call of the pipeline: size, frames, steps, guidance, shift, solver, sigma_grid.

    Raises:
        RequestError: the model takes images, for which no samples are at hand.
    """
    from wan_infer.mini import wan_mini
    from wan_infer.pipeline import WanPipeline

    if pipe is None:
        pipe = WanPipeline.from_pretrained(ckpt_dir or wan_mini(), device=device)
    if pipe.config.model_type != "t2v":
        raise RequestError(f"a schedule is searched for text to video; this is {pipe.config.model_type}: name a file")
    chosen, opened = pipe.settings(**settings), pipe
    sampler = make_sampler(chosen.solver, chosen.steps, chosen.shift, sigma_grid=chosen.sigma_grid)

    def run(samples: Sequence[tuple[str, int]], cache: VelocityCache) -> Tensor:
        noise = torch.stack([draw_noise(opened.latent_shape(chosen), seed) for _, seed in samples])
        prompts = [prompt for prompt, _ in samples]
        return opened(prompts, latents=noise, cache=cache, **{**asdict(chosen), "seed": 0}).latents

    mini = pipe.task.name == "t2v-mini"
    prompts = _MINI_PROMPTS if mini else _PROMPTS
    half = len(prompts) // 2
    return {
        "run": run,
        "sigmas": sampler.sigmas.tolist(),
        "calibration": [(prompt, seed) for seed, prompt in enumerate(prompts[:half], start=_FIRST_SEED)],
        "validation": [(prompt, seed) for seed, prompt in enumerate(prompts[half:], start=_FIRST_SEED + half)],
        "made": made_of(pipe.transformer, chosen),
        "batch": half if mini else 1,
        "every": 3 if mini else max(3, chosen.steps // 8),
    }


def searched(pipe: WanPipeline, settings: Settings, share: float, *, watch: OnSearch | None = None) -> Schedule:
    """Return the schedule of ``auto``: from the user's folder of schedules, or searched and put there.

    An interrupted search goes on where it stopped.

    Args:
        pipe: with it.
        settings: of the videos; size and frames count as well.
        share: of the steps.
        watch: is told the cost before anything runs, and how far the search is.

    Raises:
        RequestError: as `problem`, or the share is too small, or there is none yet and several processes would search.
    """
    wanted = {key: value for key, value in asdict(settings).items() if key != "seed"}
    with _explained():
        arguments = problem(pipe, **wanted)
    name = json.dumps([asdict(arguments["made"]), wanted, share], sort_keys=True)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "wan-infer" / "schedules"
    file = folder / f"{pipe.task.name}-{share:g}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    processes = pipe.parallel.processes

    def find() -> Schedule:
        with _explained():
            if file.exists():
                return Schedule.load(file)
            if processes.size > 1:
                raise RequestError(
                    f"there is no schedule for {_AUTO}{share:g} and these settings yet; search it once in one process: "
                    "run the same without torchrun, or name the file of a schedule"
                )
            folder.mkdir(parents=True, exist_ok=True)
            journal = file.with_suffix(".journal")
            found = search(**arguments, budget=share, trials=0, journal=journal, watch=watch)
            found.save(file, overwrite=True)  # another process may have been faster
            journal.unlink(missing_ok=True)
            return found

    return processes.once(find)


def _attached(config: CacheConfig, transformer: WanTransformer, steps: int) -> AbstractContextManager[BlockCache]:
    """Attach the cache that a `CacheConfig` describes."""
    depth = len(transformer.blocks)
    with _explained():
        if config.blocks_count != depth or config.steps_count != steps:
            raise RequestError(
                f"the cache is for {config.blocks_count} blocks and {config.steps_count} steps; "
                f"this model has {depth}, this run {steps}"
            )
        attention = config.method == "attention_cache"
        return attach(
            transformer,
            Interval(interval=config.step_interval, start=config.step_start, end=config.step_end),
            what="attention" if attention else "range",
            blocks="blocks",
            between=None if attention else (config.block_start, min(config.block_end, depth)),
            attention="self_attn" if attention else None,
            branches=SIDES,
        )


def _checked(config: CacheConfig) -> CacheAgent:
    """Check a configuration, in the words of MindIE SD."""
    with _explained():
        return CacheAgent(config)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except CacheError as error:
        raise RequestError(str(error)) from error


_FIRST_SEED = 2_000_000  # of calibration; training and judging of wan-mini use others
_MINI_PROMPTS = tuple(
    f"the digit {digit} moves {direction}"
    for digit, direction in zip((*range(10), *range(6)), ("left", "up", "right", "down") * 4, strict=True)
)
_PROMPTS = (
    "A red fox runs through fresh snow at the edge of a forest, powder flies up behind it, the camera follows.",
    "A potter's hands shape a bowl on a turning wheel, close up, warm light from a window.",
    "Waves break on black rocks at dusk, slow motion, spray in the wind.",
    "A busy crossing in a large city at night in the rain, neon lights, people with umbrellas.",
    "An old steam train crosses a stone bridge in the mountains, seen from a drone.",
    "A child blows soap bubbles in a garden, they drift and burst, shallow depth of field.",
    "A bowl of noodles, steam rises, chopsticks lift some of them, studio light.",
    "A dancer in a yellow dress turns on an empty stage, one spotlight from above.",
)
