"""Every generation that a search runs: each is run once, counted, and remembered in the journal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from torch import Tensor

from dit_cache.errors import SearchError
from dit_cache.schedule import Schedule
from dit_cache.searcher.costs import Recording
from dit_cache.searcher.journal import Journal
from dit_cache.searcher.measure import Disturbed, Recorder, Run, Sample, decibels, gains, run_checked
from dit_cache.searcher.progress import Counter


@dataclass(kw_only=True)
class Bench(Generic[Sample]):
    """Runs generations.

    Args:
        run: see :mod:`.measure`.
        sigmas: noise levels of the steps and of the end.
        batch: samples in one call of `run`.
        every: at how many steps a recorded generation is disturbed.
        journal: what was measured before.
        counter: counts generations.
    """

    run: Run[Sample]
    sigmas: Sequence[float]
    batch: int
    every: int
    journal: Journal
    counter: Counter
    _references: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of a generation."""
        return len(self.sigmas) - 1

    @property
    def disturbed(self) -> list[int]:
        """The steps at which a recorded generation is disturbed."""
        return sorted({*range(1, self.steps, self.every), self.steps - 1})

    def recording_cost(self, samples: int) -> float:
        """Return what `record` costs, in uncached generations of one sample."""
        return samples * (1 + sum(self.steps - 1 - step for step in self.disturbed) / self.steps)

    def record(self, samples: Sequence[Sample]) -> Recording:
        """Record and disturb the generation of every sample."""
        found: list[dict[str, Any]] = []
        for batch in self._batches(samples):
            keys = [f"recording {name}" for name in names_of(batch)]
            known = self.journal.known(keys)
            if known is None:
                known = self.journal.put(keys, self._record(batch))
            else:
                self.counter.advance("recorded before", self.recording_cost(len(batch)), paid=False)
            found += known
        measured = torch.tensor([each["gains"] for each in found], dtype=torch.float64).mean(0)
        return Recording(
            gram=torch.tensor([each["gram"] for each in found], dtype=torch.float64),
            gains=_between(self.disturbed, measured.tolist(), self.steps),
            sigmas=torch.tensor(self.sigmas, dtype=torch.float64),
        )

    def score(self, schedule: Schedule, samples: Sequence[Sample]) -> float:
        """Return the mean score of a schedule in live runs, in dB; see `Schedule`."""
        found: list[float] = []
        for batch in self._batches(samples):
            keys = [f"score {schedule.plan} {name}" for name in names_of(batch)]
            known = self.journal.known(keys)
            cost, paid = len(batch) * schedule.flops_share, known is None
            if known is None:
                final = run_checked(self.run, batch, schedule.cache(), self.steps)
                known = self.journal.put(keys, decibels(final, self._reference(batch)))
            self.counter.advance("live runs", cost, paid=paid)
            found += known
        return sum(found) / len(found)

    def known_score(self, schedule: Schedule, samples: Sequence[Sample]) -> float | None:
        """Return what `score` measured before, None if it did not."""
        known = self.journal.known([f"score {schedule.plan} {name}" for name in names_of(samples)])
        return None if known is None else sum(known) / len(known)

    def _record(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        recorder = Recorder()
        reference = run_checked(self.run, samples, recorder, self.steps)
        self._references.update(zip(names_of(samples), reference, strict=True))
        self.counter.advance("recording", len(samples))
        by_step = []
        for step in self.disturbed:
            width = abs(self.sigmas[step + 1] - self.sigmas[step])
            disturbed = Disturbed(recorder.velocities, step)
            by_step.append(gains(run_checked(self.run, samples, disturbed, self.steps), reference, disturbed, width))
            self.counter.advance("propagation of errors", len(samples) * (self.steps - 1 - step) / self.steps)
        by_sample = zip(*by_step, strict=True)
        return [{"gram": g.tolist(), "gains": list(e)} for g, e in zip(recorder.gram(), by_sample, strict=True)]

    def _reference(self, samples: Sequence[Sample]) -> Tensor:
        names = names_of(samples)
        if any(name not in self._references for name in names):
            reference = run_checked(self.run, samples, Recorder(), self.steps)
            self._references.update(zip(names, reference, strict=True))
            self.counter.advance("reference", len(samples))
        return torch.stack([self._references[name] for name in names])

    def _batches(self, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        for start in range(0, len(samples), self.batch):
            yield samples[start : start + self.batch]


def names_of(samples: Sequence[Sample]) -> list[str]:
    """Return a name for each sample: its JSON.

    Raises:
        SearchError: a sample is no JSON value.
    """
    try:
        return [json.dumps(sample, ensure_ascii=False, sort_keys=True) for sample in samples]
    except TypeError as error:
        raise SearchError(f"a sample is no JSON value ({error}); take for example [prompt, seed]") from error


def _between(at: Sequence[int], values: Sequence[float], steps: int) -> Tensor:
    """Values at every step, on straight lines between the measured ones; beyond them, those at the ends."""
    filled = []
    for step in range(steps):
        above = next((n for n, known in enumerate(at) if known >= step), len(at) - 1)
        below = above if at[above] == step else max(0, above - 1)
        span = at[above] - at[below]
        part = max(0.0, (step - at[below]) / span) if span else 0.0
        filled.append(values[below] + part * (values[above] - values[below]))
    return torch.tensor(filled, dtype=torch.float64)
