"""Steps that must not touch the weights: a loss or a gradient that is no number, a loss that leaps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from mm_finetune.errors import AnomalyError
from mm_finetune.watching.metrics import json_line

# Losses that a leap is measured against, and how many of them it takes before one is called a leap.
WINDOW, ENOUGH = 50, 10
# Weights that are broken stay so: then no step passes, and skipping goes on for ever.
MOST_SKIPPED = 20


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """Why a step was refused."""

    kind: str
    loss: float
    grad_norm: float
    limit: float | None = None


class Guard:
    """Decides step by step, equally on every rank, for loss and gradient norm are the same numbers there.

    >>> guard = Guard(None, policy="skip")
    >>> guard.decide(2.0, 1.0), guard.decide(math.nan, 1.0)
    (True, False)

    Args:
        path: ``anomalies.jsonl``; None on ranks that write nothing.
        policy: ``stop`` or ``skip``.
        spike_factor: a loss above this many times the median of the last 50 is a spike; 0: never.
    """

    def __init__(self, path: Path | None, *, policy: Literal["stop", "skip"], spike_factor: float = 0.0) -> None:
        self.path, self.policy, self.spike_factor = path, policy, spike_factor
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.found: Anomaly | None = None
        self.skipped_in_a_row = 0

    def decide(self, loss: float, grad_norm: float) -> bool:
        """Whether a step with these numbers may change the weights; asked before it does."""
        self.found = self._judge(loss, grad_norm)
        if self.found is None:
            self.losses.append(loss)
        return self.found is None

    def settle(self, step: int, samples: Sequence[int]) -> None:
        """After the step: write down what was refused, and end the run where that is the policy.

        Args:
            step: its number.
            samples: numbers of its records, from 0.

        Raises:
            AnomalyError: on every rank.
        """
        if self.found is None:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self._write(step, samples, self.found)
        if self.policy == "stop":
            remedy = "look at these records, lower train.lr, or pass over such steps with train.on_nan=skip"
        elif self.skipped_in_a_row == MOST_SKIPPED:
            remedy = f"it is the {MOST_SKIPPED}th step in a row that was skipped; lower train.lr"
        else:
            return
        raise AnomalyError(
            f"step {step} of records {_few(samples)}: {self.found.kind} (loss {self.found.loss:g}, gradient norm"
            f" {self.found.grad_norm:g}); the weights are as they were before it, anomalies.jsonl has the details; "
            + remedy
        )

    def _judge(self, loss: float, grad_norm: float) -> Anomaly | None:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return Anomaly(kind=f"{name} is no number", loss=loss, grad_norm=grad_norm)
        if self.spike_factor and len(self.losses) >= ENOUGH:
            limit = self.spike_factor * median(self.losses)
            if loss > limit:
                return Anomaly(kind="loss spike", loss=loss, grad_norm=grad_norm, limit=limit)
        return None

    def _write(self, step: int, samples: Sequence[int], found: Anomaly) -> None:
        if self.path is None:
            return
        row = {"step": step, **vars(found), "action": self.policy, "samples": list(samples)}
        with self.path.open("ab", buffering=0) as file:
            file.write(json_line(row))


def _few(samples: Sequence[int], count: int = 8) -> str:
    more = f", … ({len(samples)} in all)" if len(samples) > count else ""
    return ", ".join(map(str, samples[:count])) + more
