"""Measures steps and writes them down."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from mm_finetune.watching.lines import megatron_line, plain_line
from mm_finetune.watching.metrics import Metrics, json_line
from mm_finetune.watching.trackers import Tracker

SECONDS_BETWEEN_LINES = 2.0


class RunLog:
    """The log of a run: a line on the console, an object a step in ``metrics.jsonl``, and trackers.

    Every object is one write: whatever ends the process, no line is left half.

    Args:
        path: ``metrics.jsonl``; None on processes that say nothing.
        steps: steps of the run.
        samples: samples a step.
        done: steps that are done already, of a run that is resumed: what the file says of later ones goes.
        console: where lines go; default: stdout.
        log_format: ``plain`` or ``megatron``.
        log_every: steps between lines; default: each for ``megatron``, else one line in two seconds.
        log_tps: tokens of an average sample in the ``megatron`` line.
        peak_flops: what all devices together can do at most, in operations a second, where known.
        memory: gives the most bytes held so far.
        trackers: told of every step, and closed with this.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        steps: int,
        samples: int,
        done: int = 0,
        console: TextIO | None = None,
        log_format: Literal["plain", "megatron"] = "plain",
        log_every: int | None = None,
        log_tps: bool = False,
        peak_flops: float | None = None,
        memory: Callable[[], int] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.steps, self.samples, self.done = steps, samples, done
        self.console = console or sys.stdout
        self.log_format, self.log_every, self.log_tps = log_format, log_every, log_tps
        self.peak_flops, self.memory, self.trackers = peak_flops, memory, trackers
        kept = _keep(path, done) if path else []
        self.file = path.open("ab", buffering=0) if path else None
        self.elapsed_before = float(kept[-1].get("elapsed_s", 0.0)) if kept else 0.0
        self.skipped = sum(bool(row.get("skipped")) for row in kept)
        self.nans = sum(row.get("loss") is None for row in kept)
        self.started = self.before = time.monotonic()
        self.waited = self.line_due = 0.0

    def begin(self) -> None:
        """Count time from now on: the first step begins."""
        self.started = self.before = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever waits for data: its time is the data wait share."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what belongs to no step, an evaluation: the next step's time begins after it."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.before += time.monotonic() - began

    def evaluated(self, number: int, values: Mapping[str, float], said: str) -> None:
        """Note an evaluation after a step: `values` go to trackers, under ``eval_…``, `said` to the console."""
        if self.file:
            for tracker in self.trackers:
                tracker.log(number, {f"eval_{name}": value for name, value in values.items()})
            self.console.write(f"step {number}/{self.steps}  held out: {said}\n")
            self.console.flush()

    def step(
        self,
        number: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: int,
        flops: float | None = None,
        skipped: bool = False,
        more: Mapping[str, float] | None = None,
    ) -> Metrics:
        """Note a finished step; `flops` is what it needed on all devices together, `more` what else is said of it."""
        now = time.monotonic()
        seconds, elapsed = max(now - self.before, 1e-9), now - self.started
        metrics = Metrics(
            step=number,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=tokens,
            samples=self.samples,
            step_s=round(seconds, 6),
            tokens_per_second=round(tokens / seconds, 1),
            samples_per_second=round(self.samples / seconds, 2),
            data_wait=round(min(1.0, self.waited / seconds), 4),
            mfu=round(flops / seconds / self.peak_flops, 4) if flops and self.peak_flops else None,
            memory_gib=round(self.memory() / 2**30, 3) if self.memory else None,
            elapsed_s=round(self.elapsed_before + elapsed, 3),
            eta_s=round(elapsed / max(1, number - self.done) * (self.steps - number), 1),
            skipped=skipped,
            more=more or {},
        )
        self.before, self.waited = now, 0.0
        self.skipped, self.nans = self.skipped + skipped, self.nans + (not math.isfinite(loss))
        if self.file:
            self._write(metrics, now)
        return metrics

    def _write(self, metrics: Metrics, now: float) -> None:
        assert self.file is not None, "only called where there is a file"
        self.file.write(json_line(metrics.row()))
        for tracker in self.trackers:
            tracker.log(metrics.step, metrics.values())
        every = self.log_every or (1 if self.log_format == "megatron" else None)
        due = metrics.step % every == 0 if every else now >= self.line_due
        if due or metrics.skipped or metrics.step == self.steps:
            self.line_due = now + SECONDS_BETWEEN_LINES
            self.console.write(self.line(metrics) + "\n")
            self.console.flush()

    def line(self, metrics: Metrics) -> str:
        """The console line of a step."""
        if self.log_format == "plain":
            return plain_line(metrics, self.steps)
        return megatron_line(
            metrics,
            self.steps,
            consumed=metrics.step * self.samples,
            tokens_per_sample=self.log_tps,
            skipped=self.skipped,
            nans=self.nans,
            now=datetime.now(),
        )

    def close(self) -> None:
        """Close the file and the trackers."""
        if self.file:
            self.file.close()
        for tracker in self.trackers:
            tracker.close()


def _keep(path: Path, done: int) -> list[dict[str, Any]]:
    """Leave in the file the steps up to `done`, and give them; a line that a crash of the machine cut is dropped."""
    rows = []
    for line in path.read_bytes().splitlines() if done and path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", math.inf) <= done:
            rows.append(row)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(b"".join(json_line(row) for row in rows))
    temporary.replace(path)
    return rows
