"""What does the cache of the Ascend walk-through gain and cost, and what is found at the same compute?

    python benchmarks/cache_walkthrough.py --output walkthrough.json
    python benchmarks/cache_walkthrough.py --time --rounds 5

The walk-through sets 50 steps, start 20, interval 2, end 47, and blocks 10 up to 30 of 40. wan-mini has 6 blocks:
here it is blocks 2 up to 5, half of the depth as there. (By proportion they would begin in the middle of block 1.) So
the executed share of block calls is the same, 1720 of 2000, or 1700 where the end is ignored, as MindIE SD 3.1 does for
blocks. Beside it: what `search_block_cache` finds for that share, the attention cache with the same steps, and a
schedule at the solver for the executed operations of the walk-through. All are judged on (prompt, seed) pairs that no
search saw, and timed in turns with an uncached run.

With --time, instead: does time follow operations, where a step of the transformer takes 50 ms and more? The weights are
random, which does not matter to time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from wan_pipeline import SIZES, alternate

from dit_cache import BlockCache, CacheAgent, CacheConfig, Interval, Schedule, Static, VelocityCache, attach, search
from dit_cache.errors import CacheError
from dit_cache.meter import FlopMeter, compare
from dit_cache.searcher.block_cache import search_block_cache
from wan_infer import WanPipeline, draw_noise, wan_mini
from wan_infer.caching import SIDES, problem
from wan_infer.transformer import WanTransformer

STEPS, DEPTH = 50, 6
STEPS_OF_IT = {"step_start": 20, "step_interval": 2, "step_end": 47}
ORIGINAL = CacheConfig("dit_block_cache", 40, STEPS, **STEPS_OF_IT, block_start=10, block_end=30)
SCALED = replace(ORIGINAL, blocks_count=DEPTH, block_start=2, block_end=5)
FIRST_SEED = 3_000_000  # the searches, training and judging of wan-mini use others
FOLLOWS = 0.9  # of the operations that are saved, the part that is wanted as time
LONG_STEPS, SHARES = 20, (0.25, 0.4, 0.5, 0.7)

Sample = tuple[str, int]


def main() -> int:
    """Measure, print tables, write JSON; the exit code is 2 when something is missing or fails."""
    arguments = _parse()
    try:
        record = time_and_operations(arguments) if arguments.time else walkthrough(arguments)
        if arguments.output is not None:
            write_json(arguments, record)
    except (OSError, CacheError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


# ---- the walk-through -----------------------------------------------------------------------------------------------


def agent_calls(*, legacy: bool) -> int:
    """Return how many blocks an agent executes with the configuration of the walk-through, of 40 · 50."""
    agent, calls = CacheAgent(ORIGINAL, legacy=legacy), 0

    def block(hidden_states: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return hidden_states + 1

    hidden = torch.zeros(1)
    with agent.generation():
        for _ in range(ORIGINAL.steps_count * ORIGINAL.blocks_count):
            hidden = agent.apply(block, hidden_states=hidden)
    return calls


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one cache did.

    Attributes:
        cache: its name, and what it is.
        blocks, attentions: executed calls of one side of the guidance in one generation.
        flops: executed operations of the transformer, of those of the uncached run.
        psnr, ssim: of every test pair.
        seconds, uncached: of every round, taken in turns.
    """

    cache: str
    what: str
    blocks: float
    attentions: float
    flops: float
    psnr: list[float]
    ssim: list[float]
    seconds: list[float]
    uncached: list[float]

    @property
    def time(self) -> float:
        """Median time, of that of the uncached run."""
        return statistics.median(self.seconds) / statistics.median(self.uncached)


def walkthrough(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all caches; returns what is written as JSON."""
    originals = {"step_end honoured": agent_calls(legacy=False), "legacy": agent_calls(legacy=True)}
    print(f"walk-through, executed block calls of {40 * STEPS}: {originals}")
    pipe = WanPipeline.from_pretrained(wan_mini(), device="cpu")
    pairs = [(f"the digit {n % 10} moves {('left', 'up', 'right', 'down')[n % 4]}", FIRST_SEED + n)
             for n in range(arguments.pairs)]  # fmt: skip
    whole = _flops(pipe, pairs[0], None)
    share = _flops(pipe, pairs[0], SCALED) / whole
    references = [_generate(pipe, pair, None).video() for pair in pairs]
    print(f"\n{'cache':22} {'blocks':>7} {'attn':>5} {'FLOPs':>6} {'time':>5} {'PSNR':>6} {'worst':>6} {'SSIM':>7} "
          f"{'worst':>7}  what")  # fmt: skip
    rows = []
    for name, cache in caches(pipe, share, arguments):
        rows.append(_row(pipe, pairs, references, name, cache, whole, arguments.rounds))
        print(_line(rows[-1]), flush=True)
    return {"walkthrough_block_calls": originals, "rows": [asdict(row) for row in rows]}


def caches(
    pipe: WanPipeline, share: float, arguments: argparse.Namespace
) -> Iterator[tuple[str, CacheConfig | Schedule]]:
    """What is measured; each is searched when it is its turn.

    Args:
        pipe: wan-mini.
        share: executed operations of the walk-through's cache, for the schedule.
        arguments: of the command line.
    """
    yield "walk-through", SCALED
    yield "... end ignored", replace(SCALED, step_end=STEPS - 1)
    task = problem(pipe, steps=STEPS)
    found = search_block_cache(
        partial(_run, pipe, task["sigmas"]),
        pipe.transformer,
        steps=STEPS,
        speedup=40 * STEPS / agent_calls(legacy=False),
        calibration=task["calibration"],
        validation=task["validation"],
        branches=SIDES,
        blocks="blocks",
        batch=task["batch"],
    )
    yield "searched blocks", found.config
    yield "attention, 20/2/47", CacheConfig("attention_cache", DEPTH, STEPS, **STEPS_OF_IT)
    yield "searched schedule", search(**task, budget=share, trials=arguments.trials)


def _run(pipe: WanPipeline, sigmas: Sequence[float], samples: Sequence[Sample], cache: BlockCache) -> Tensor:
    """One generation of several samples, with a cache that is attached already: what a search runs."""
    latents = torch.stack([draw_noise(pipe.latent_shape(pipe.settings(steps=STEPS)), seed) for _, seed in samples])
    with cache.generation(sigmas):
        return pipe([prompt for prompt, _ in samples], latents=latents, steps=STEPS).latents


def _generate(pipe: WanPipeline, pair: Sample, cache: CacheConfig | Schedule | None) -> Any:
    prompt, seed = pair
    return pipe(prompt, seed=seed, steps=STEPS, cache=cache)


def _flops(pipe: WanPipeline, pair: Sample, cache: CacheConfig | Schedule | None) -> int:
    with FlopMeter() as meter:
        _generate(pipe, pair, cache)
    return meter.flops


def _row(
    pipe: WanPipeline,
    pairs: Sequence[Sample],
    references: Sequence[Tensor],
    name: str,
    cache: CacheConfig | Schedule,
    whole: int,
    rounds: int,
) -> Row:
    with _counted(pipe.transformer) as counts:
        scores = [
            compare(reference, _generate(pipe, pair, cache).video()).mean
            for pair, reference in zip(pairs, references, strict=True)
        ]
    each = len(pairs) * len(SIDES)
    seconds = alternate(
        {
            "uncached": lambda: _generate(pipe, pairs[0], None).latents,
            "cached": lambda: _generate(pipe, pairs[0], cache).latents,
        },
        rounds,
    )
    return Row(
        cache=name,
        what=_what(cache),
        blocks=counts["ffn"] / each,
        attentions=counts["self_attn"] / each,
        flops=_flops(pipe, pairs[0], cache) / whole,
        psnr=[score.psnr for score in scores],
        ssim=[score.ssim for score in scores],
        seconds=seconds["cached"],
        uncached=seconds["uncached"],
    )  # fmt: skip


@contextmanager
def _counted(transformer: nn.Module) -> Iterator[Counter[str]]:
    """Count what is executed in the blocks: modules whose own forward is not the cached one."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: counts.update([name])

    inside = {"ffn": "ffn", "self_attn.o": "self_attn"}
    handles = [
        module.register_forward_hook(count(inside[name]))
        for block in transformer.get_submodule("blocks").children()
        for name, module in block.named_modules()
        if name in inside
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# ---- time and operations --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What one cache saves.

    Attributes:
        cache: its name.
        flops: saved share of the operations.
        time: saved share of the time, by the medians.
        seconds: of every round.
    """

    cache: str
    flops: float
    time: float
    seconds: list[float]

    @property
    def follows(self) -> float:
        """How much of what is saved in operations is saved in time."""
        return self.time / self.flops


def time_and_operations(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both for every share; returns what is written as JSON."""
    size = SIZES["small"]
    torch.manual_seed(0)
    model = WanTransformer(size.transformer).eval().requires_grad_(False)
    noise = draw_noise((1, *size.latents(size.frames)), 0)
    with torch.inference_mode():
        text = model.prepare_text(draw_noise((1, 40, size.transformer.text_dim), 1))
        runs = {"uncached": lambda: _steps(model, noise, text), **_masked(model, noise, text)}
        flops = {name: _metered(run) for name, run in runs.items()}  # warms up as well
        seconds = alternate(runs, arguments.rounds)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    step = medians["uncached"] / LONG_STEPS
    print(
        f"a step takes {1e3 * step:.0f} ms uncached\n{'cache':22} {'FLOPs saved':>12} {'time saved':>11} {'ratio':>6}"
    )
    rows = [
        Timed(
            cache=name,
            flops=1 - flops[name] / flops["uncached"],
            time=1 - medians[name] / medians["uncached"],
            seconds=seconds[name],
        )
        for name in runs
        if name != "uncached"
    ]
    for row in rows:
        note = "" if row.follows >= FOLLOWS else f"  below {FOLLOWS}"
        print(f"{row.cache:22} {row.flops:12.1%} {row.time:11.1%} {row.follows:6.3f}{note}")
    return {"seconds_of_a_step": step, "uncached": seconds["uncached"], "rows": [asdict(row) for row in rows]}


def _masked(model: WanTransformer, noise: Tensor, text: Any) -> dict[str, Callable[[], Tensor]]:
    """Runs with a share of the steps computed, and with half of the blocks in every second step."""
    runs: dict[str, Callable[[], Tensor]] = {}
    for share in SHARES:
        count = round(share * LONG_STEPS)
        computed = {n * LONG_STEPS // count for n in range(count)}
        cache = VelocityCache(Static(computed))
        runs[f"{count} of {LONG_STEPS} steps"] = partial(_steps, model, noise, text, velocities=cache)

    def ranged() -> Tensor:
        policy = Interval(interval=2)
        with attach(model, policy, what="range", between=(2, 5)) as cache, cache.generation(LONG_STEPS):
            return _steps(model, noise, text)

    return {**runs, "blocks 2-5, interval 2": ranged}


def _steps(model: WanTransformer, noise: Tensor, text: Any, *, velocities: VelocityCache | None = None) -> Tensor:
    """Euler from noise to nothing; without guidance, for a step to be one call."""
    cache, latents = velocities or VelocityCache(Static(range(LONG_STEPS))), noise
    with cache.generation(LONG_STEPS):
        for step in range(LONG_STEPS):
            time = torch.tensor([1000 * (1 - step / LONG_STEPS)])
            latents = latents - cache.velocity(partial(model, latents, time, text), latents) / LONG_STEPS
    return latents


def _metered(run: Callable[[], Tensor]) -> int:
    with FlopMeter() as meter:
        run()
    return meter.flops


# ---- what is said ---------------------------------------------------------------------------------------------------


def _what(cache: CacheConfig | Schedule) -> str:
    if isinstance(cache, Schedule):
        return f"{len(cache.computed)} of {len(cache.plan)} steps: {cache.plan}"
    steps = f"{cache.step_start}/{cache.step_interval}/{cache.step_end}"
    return f"{steps}, blocks {cache.block_start}-{min(cache.block_end, cache.blocks_count)}"


def _line(row: Row) -> str:
    return (
        f"{row.cache:22} {row.blocks:7.0f} {row.attentions:5.0f} {row.flops:6.3f} {row.time:5.2f} "
        f"{statistics.mean(row.psnr):6.2f} {min(row.psnr):6.2f} {statistics.mean(row.ssim):7.4f} "
        f"{min(row.ssim):7.4f}  {row.what}"
    )


def write_json(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Write every single number, and what they were taken on."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    settings = {key: getattr(arguments, key) for key in ("time", "pairs", "rounds", "trials", "threads")}
    text = json.dumps({"machine": machine, "settings": settings, **record}, indent=2, allow_nan=False)
    arguments.output.write_text(text + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="measure whether time follows operations, instead")
    parser.add_argument("--pairs", type=_positive, default=8, help="test pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=5, help="that are timed (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=4, help="of the schedule's search (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where the single numbers go, as JSON (default: nowhere)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is expected")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
