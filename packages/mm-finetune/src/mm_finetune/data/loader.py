"""The micro-batches of one process, step by step, read ahead.

::

    with closing(Loader(dataset, settings, exchange=exchange, bad=dataset.check())) as loader:
        for step in range(first, last + 1):
            data = loader.step(step, device)
            trainer.step(data.batches, lr)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mm_finetune.data.batches import Batch, EncodedSample, collate
from mm_finetune.data.dataset import MIB, Dataset
from mm_finetune.data.exchange import Alone, Exchange
from mm_finetune.data.faults import BadRecords, Fault
from mm_finetune.data.order import step_numbers
from mm_finetune.data.packing import Layout, Row
from mm_finetune.data.prefetch import LateError, Prefetcher
from mm_finetune.errors import DataError

AHEAD = 2  # steps that are planned beyond the one that is handed out; memory bounds what is read of them


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """What a loader needs to know of the run.

    Attributes:
        global_batch_size: samples a step, over all ranks.
        seed: of the order; None: as the records stand.
        last_step: nothing is read ahead beyond it.
        layout: how steps are laid out over data-parallel ranks.
        rank: this process's data-parallel rank.
    """

    global_batch_size: int
    seed: int | None = 0
    last_step: int
    layout: Layout
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class StepData:
    """A step of one process.

    Attributes:
        batches: its micro-batches.
        wait_seconds: how long the step waited for them.
        numbers: the records of the whole global batch, in their order.
        bad: those of them that carry no loss because they could not be read.
    """

    batches: list[Batch]
    wait_seconds: float
    numbers: tuple[int, ...]
    bad: tuple[int, ...]


class Loader:
    """Makes the micro-batches of one process.

    Every process must ask for the same steps in the same order: they talk with each other in each.

    Args:
        dataset: with the index that all processes share.
        settings: of the run.
        exchange: how processes talk; default: there is one.
        bad: the bad records so far; default: what :meth:`Dataset.check` gives.
    """

    def __init__(
        self,
        dataset: Dataset,
        settings: LoaderSettings,
        *,
        exchange: Exchange | None = None,
        bad: BadRecords | None = None,
    ) -> None:
        self.dataset, self.settings = dataset, settings
        self.exchange: Exchange = exchange or Alone()
        self._bad = bad or dataset.check()
        self._usable = dataset.index.usable
        self._reads = self.exchange.pixels == "read"
        config = dataset.config
        self._ahead: Prefetcher[EncodedSample] = Prefetcher(
            self._read, workers=config.workers, limit=config.prefetch_mib * MIB
        )
        self._planned: deque[tuple[int, tuple[int, ...], list[Row]]] = deque()

    def step(self, step: int, device: torch.device | None = None) -> StepData:
        """The micro-batches of a step (from 1); steps that follow each other are read ahead.

        Raises:
            DataError: a record can't be read, and ``data.on_bad`` does not bear it; on every process alike.
            ConfigError: there are too few samples for the ranks.
        """
        began = time.perf_counter()
        self._plan_up_to(step)
        _, numbers, rows = self._planned.popleft()
        samples, found = self._take([number for row in rows for number in row])
        faults = self.exchange.union(found)
        self._bad.add(faults, step=step)
        bad = tuple(sorted(set(numbers) & self._bad.records))
        if len(bad) == len(set(numbers)):
            raise DataError(f"no record of step {step} can be read; is the folder of the pictures still there?")
        laid = [[self._sound(samples[number]) for number in row] for row in rows]
        batches = [self._batch(row, device) for row in laid]
        waited = time.perf_counter() - began
        return StepData(batches=batches, wait_seconds=waited, numbers=numbers, bad=bad)

    def in_order(self, numbers: NDArray[np.int64]) -> Loader:
        """Another loader: of some records, as they stand, each once; the last step is filled with the first of them.

        What it finds bad is bad here too. It has ``settings.last_step`` steps.
        """
        steps = -(-len(numbers) // self.settings.global_batch_size)
        settings = replace(self.settings, seed=None, last_step=steps)
        other = Loader(self.dataset, settings, exchange=self.exchange, bad=self._bad)
        other._usable = numbers
        return other

    @property
    def bad(self) -> BadRecords:
        """The bad records so far."""
        return self._bad

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.close()

    def _plan_up_to(self, step: int) -> None:
        if not self._planned or self._planned[0][0] != step:
            self._ahead.forget()
            self._planned.clear()
        start = self._planned[-1][0] + 1 if self._planned else step
        for coming in range(start, max(step, min(step + AHEAD, self.settings.last_step)) + 1):
            numbers = self._numbers(coming)
            rows = self._rows(numbers)
            self._planned.append((coming, numbers, rows))
            for number in (number for row in rows for number in row):
                self._ahead.request(number, self.dataset.size(number, pixels=self._reads))

    def _numbers(self, step: int) -> tuple[int, ...]:
        settings = self.settings
        places = step_numbers(len(self._usable), step, global_batch_size=settings.global_batch_size, seed=settings.seed)
        return tuple(self._usable[places].tolist())

    def _rows(self, numbers: Sequence[int]) -> list[Row]:
        """This process's micro-batches, as record numbers."""
        lengths = self.dataset.index.tokens[list(numbers)].tolist()
        rows = self.settings.layout.plan(lengths, self.dataset.costs(numbers))[self.settings.rank]
        return [tuple(numbers[place] for place in row) for row in rows]

    def _read(self, number: int) -> EncodedSample:
        """In a thread. What is known to be bad is not tried again."""
        if number in self._bad.records:
            return self.dataset.blank(number)
        return self.dataset.encode(number, pixels=self._reads)

    def _take(self, numbers: Sequence[int]) -> tuple[dict[int, EncodedSample], list[Fault]]:
        """What was read, and what could not be; a stand-in has the same shape."""
        samples: dict[int, EncodedSample] = {}
        faults: list[Fault] = []
        for number in numbers:
            try:
                samples[number] = self._ahead.take(self._limit(number))
            except (DataError, OSError, LateError, MemoryError) as error:
                faults.append(_fault(number, error))
                samples[number] = self.dataset.blank(number)
        return samples, faults

    def _limit(self, number: int) -> float:
        sample = self.dataset.samples[number]
        return self.dataset.config.decode_timeout_s * max(1, len(sample.images) + len(sample.videos))

    def _sound(self, sample: EncodedSample) -> EncodedSample:
        return sample.silenced() if sample.number in self._bad.records else sample

    def _batch(self, samples: Sequence[EncodedSample], device: torch.device | None) -> Batch:
        batch = collate(samples, packed=self.settings.layout.room is not None)
        if not self._reads:
            batch = batch.without_pixels()
        if device is not None:
            batch = batch.to(device)
        return self.exchange.fill(batch, self.dataset.encoder.patch_width)


def _fault(number: int, error: Exception) -> Fault:
    if isinstance(error, LateError):
        return Fault(number, "hangs", f"a picture could not be read in data.decode_timeout_s: {error}")
    changed = "has changed during the run" in str(error)
    return Fault(number, "changed" if changed else "unreadable", str(error))
