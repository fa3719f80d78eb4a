"""The searcher for a `CacheConfig`: which steps, and which blocks, for a wanted speed-up.

1. One uncached generation of each calibration sample is recorded, in sketches; see :mod:`.block_planning`.
2. They predict the error of every configuration: the sum over its holes of ‖Δ_s − Δ_r‖², where Δ is what is cached, s
   the hole and r the refresh before it. All starts, ends, intervals from 2 to 6 and ranges of blocks are looked at.
3. Those with the least error are run live with the calibration samples; the best of them is scored on others.

A search costs the generations of 1 and 3, where trying every configuration would cost one generation for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Literal

import torch
from torch import Tensor, nn

from dit_cache.agent.config import ATTENTION, BLOCKS, CacheConfig
from dit_cache.engine.attaching import attach
from dit_cache.engine.blocks import BlockCache
from dit_cache.engine.finding import find_blocks
from dit_cache.engine.policies import Always, Interval
from dit_cache.engine.protocols import Policy
from dit_cache.errors import SearchError
from dit_cache.searcher.bench import names_of
from dit_cache.searcher.block_planning import BlockRecorder, Plan, plans
from dit_cache.searcher.measure import Sample, checked_latents, decibels
from dit_cache.searcher.progress import Counter, Watch

BlockRun = Callable[[Sequence[Sample], BlockCache], Tensor]

_LONGEST = 6  # interval; published configurations have 2 to 4


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A configuration that was run live.

    Attributes:
        config: what was run.
        speedup: calls of blocks, of attentions for "attention_cache", over those that are executed.
        predicted: its error in the model of the search, mean over samples.
        score: as `Schedule.score`, on calibration.
    """

    config: CacheConfig
    speedup: float
    predicted: float
    score: float


@dataclass(frozen=True, kw_only=True)
class BlockCacheFound:
    """What was found.

    Attributes:
        config: the best one.
        speedup: calls of blocks, of attentions for "attention_cache", over those that are executed: the bound of what
            can be gained in time.
        score: as `Schedule.score`, in dB, on validation.
        tried: all that were run live, the best first.
    """

    config: CacheConfig
    speedup: float
    score: float
    tried: tuple[Tried, ...]


def search_block_cache(
    run: BlockRun[Sample],
    model: nn.Module,
    *,
    steps: int,
    speedup: float = 1.3,
    method: Literal["dit_block_cache", "attention_cache"] = "dit_block_cache",
    calibration: Sequence[Sample],
    validation: Sequence[Sample],
    branches: Sequence[str] = ("",),
    blocks: str | None = None,
    attention: str | None = None,
    verify: int = 8,
    sketch: int = 4096,
    batch: int = 1,
    watch: Watch | None = None,
) -> BlockCacheFound:
    """Return the best `CacheConfig` that reaches a speed-up.

    Args:
        run: one generation: takes samples and a `BlockCache` that is attached to the model, opens
            ``cache.generation(sigmas)``, calls the model for every branch in every step, inside ``cache.at(step,
            branch)`` or counted, and returns the final latents [len(samples), …].
        model: whose blocks are cached; no cache is attached to it.
        steps: of a generation.
        speedup: calls of blocks, of attentions for "attention_cache", over those that are executed, at least.
        method: of the configuration.
        calibration: samples that it is found with.
        validation: others, that it is scored on. JSON values both, as a rule [prompt, seed].
        branches: sides of the guidance, in the order of their calls in each step.
        blocks, attention: where they are, as in `attach`.
        verify: how many configurations are run live, with all calibration samples each.
        sketch: positions of a tensor that are recorded at each block, as 32-bit floats, two times for each step.
        batch: samples in one call of `run`.
        watch: is told the cost before anything runs, then how far the search is.

    Raises:
        SearchError: an argument cannot be used, no configuration reaches the speed-up, or the run is none.
        ConfigError: blocks or attentions are not found.
    """
    _check(steps, method, calibration, validation, verify=verify, sketch=sketch, batch=batch)
    _check_speedup(speedup, steps)
    search = _Search(
        run=run, model=model, steps=steps, method=method, branches=branches, blocks=blocks, attention=attention,
        batch=batch, counter=Counter(watch=watch),
    )  # fmt: skip
    with search.recorder(sketch) as recorder:
        search.counter.announce((1 + verify) * len(calibration) + 2 * len(validation))
        errors, ranges = search.record(recorder, calibration), recorder.ranges()
    tried = [search.tried(plan, calibration) for plan in plans(errors, ranges, speedup, count=verify)]
    tried.sort(key=lambda each: each.score, reverse=True)
    config, bound = tried[0].config, tried[0].speedup
    return BlockCacheFound(config=config, speedup=bound, score=search.score(config, validation), tried=tuple(tried))


@dataclass(kw_only=True)
class _Search(Generic[Sample]):
    """Runs generations; see `search_block_cache`."""

    run: BlockRun[Sample]
    model: nn.Module
    steps: int
    method: str
    branches: Sequence[str]
    blocks: str | None
    attention: str | None
    batch: int
    counter: Counter
    _references: dict[str, Tensor] = field(default_factory=dict)

    def recorder(self, positions: int) -> BlockRecorder:
        """Attach a recorder."""
        return BlockRecorder(
            self.model, attention=self.method == ATTENTION, blocks=self.blocks, module=self.attention,
            branches=self.branches, positions=positions,
        )  # fmt: skip

    def record(self, recorder: BlockRecorder, samples: Sequence[Sample]) -> Tensor:
        """Return the errors, [reach + 1, T, R], the mean over samples."""
        total = torch.zeros(())
        for batch in self._batches(samples):
            self._references.update(zip(names_of(batch), self._final(batch, recorder, "recording"), strict=True))
            total = total + recorder.errors(_LONGEST - 1)
        return total / len(samples)

    def tried(self, plan: Plan, samples: Sequence[Sample]) -> Tried:
        """Run a plan live."""
        depth = len(find_blocks(self.model, self.blocks))
        config = CacheConfig(self.method, depth, self.steps, plan.start, plan.interval, plan.end)
        if self.method == BLOCKS:
            config = replace(config, block_start=plan.between[0], block_end=plan.between[1])
        score = self.score(config, samples)
        return Tried(config=config, speedup=1 / plan.executed, predicted=plan.error, score=score)

    def score(self, config: CacheConfig, samples: Sequence[Sample]) -> float:
        """Return the mean score of live runs, in dB; see `Schedule`."""
        policy = Interval(interval=config.step_interval, start=config.step_start, end=config.step_end)
        between = (config.block_start, config.block_end) if self.method == BLOCKS else None
        found: list[float] = []
        for batch in self._batches(samples):
            reference = self._reference(batch)
            with self._attached(policy, between) as cache:
                found += decibels(self._final(batch, cache, "live runs"), reference)
        return sum(found) / len(found)

    def _attached(self, policy: Policy, between: tuple[int, int] | None = None) -> BlockCache:
        return attach(
            self.model,
            policy,
            what="attention" if self.method == ATTENTION else "stack" if between is None else "range",
            between=between,
            blocks=self.blocks,
            attention=self.attention,
            branches=self.branches,
        )

    def _reference(self, samples: Sequence[Sample]) -> Tensor:
        names = names_of(samples)
        if any(name not in self._references for name in names):
            with self._attached(Always()) as cache:
                self._references.update(zip(names, self._final(samples, cache, "reference"), strict=True))
        return torch.stack([self._references[name] for name in names])

    def _final(self, samples: Sequence[Sample], cache: BlockCache, stage: str) -> Tensor:
        """Return the final latents of a run, on the CPU, after a look at what it did."""
        with torch.no_grad():
            final = self.run(samples, cache)
        wanted = {(step, branch) for step in range(self.steps) for branch in self.branches}
        seen = [(entry.step, entry.branch) for entry in cache.ledger.entries]
        if len(seen) != len(wanted) or set(seen) != wanted:
            raise SearchError(
                f"the run called the model {len(seen)} times inside of cache.generation(); {len(wanted)} are expected: "
                f"{self.steps} steps, and in each the branches {list(self.branches)}"
            )
        self.counter.advance(stage, len(samples))
        return checked_latents(final, len(samples))

    def _batches(self, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        for start in range(0, len(samples), self.batch):
            yield samples[start : start + self.batch]


def _check(
    steps: int, method: str, calibration: Sequence[Sample], validation: Sequence[Sample], **numbers: int
) -> None:
    if method not in (BLOCKS, ATTENTION):
        raise SearchError(f"the method is {method!r}; there are {BLOCKS} and {ATTENTION}")
    if steps < 2 or min(numbers.values()) < 1:
        given = ", ".join(f"{name} is {value}" for name, value in {"steps": steps, **numbers}.items())
        raise SearchError(f"{given}; at least 2 steps, and whole numbers from 1 on, are legal")
    if not calibration or not validation:
        raise SearchError("samples are missing; 2 for calibration and 4 others for validation are a good start")
    if same := set(names_of(calibration)) & set(names_of(validation)):
        raise SearchError(f"samples are in calibration and in validation: {', '.join(sorted(same))}")


def _check_speedup(speedup: float, steps: int) -> None:
    """Refuse what is not reached with all blocks in the longest interval from the first step on."""
    largest = steps / -(-steps // _LONGEST)
    if not 1 < speedup <= largest + 1e-9:
        raise SearchError(
            f"the speed-up is {speedup}; above 1 and up to {largest:.2f} is possible with {steps} steps, the latter "
            f"with all blocks cached and every {_LONGEST}th step computed"
        )
