"""What a run says of itself: a line on the console, an object a step in ``metrics.jsonl``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

SECONDS_BETWEEN_LINES = 2.0


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One step. Times in seconds; `tokens` without padding, over the whole global batch."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    samples_per_second: float
    elapsed_s: float
    eta_s: float


class RunLog:
    """Measures steps and writes them down.

    Args:
        path: the JSONL file; None on processes that say nothing.
        steps: steps of the run.
        samples: samples a step.
        console: where lines go; default: stdout.
    """

    def __init__(self, path: Path | None, *, steps: int, samples: int, console: TextIO | None = None) -> None:
        self.file = path.open("w", encoding="utf-8") if path else None
        self.steps, self.samples, self.console = steps, samples, console or sys.stdout
        self.started = self.before = time.monotonic()
        self.line_due = 0.0

    def step(self, number: int, *, loss: float, lr: float, grad_norm: float, tokens: int) -> Metrics:
        """Note a finished step."""
        now = time.monotonic()
        seconds, elapsed = max(now - self.before, 1e-9), now - self.started
        self.before = now
        metrics = Metrics(
            step=number,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=tokens,
            tokens_per_second=round(tokens / seconds, 1),
            samples_per_second=round(self.samples / seconds, 2),
            elapsed_s=round(elapsed, 3),
            eta_s=round(elapsed / number * (self.steps - number), 1),
        )
        if self.file:
            self.file.write(json.dumps(asdict(metrics)) + "\n")
            self.file.flush()
            if now >= self.line_due or number == self.steps:
                self.line_due = now + SECONDS_BETWEEN_LINES
                self.console.write(self.line(metrics) + "\n")
                self.console.flush()
        return metrics

    def line(self, m: Metrics) -> str:
        """The console line of a step."""
        minutes, seconds = divmod(round(m.eta_s), 60)
        return (
            f"step {m.step:>{len(str(self.steps))}}/{self.steps}  loss {m.loss:.4f}  lr {m.lr:.2e}"
            f"  grad norm {m.grad_norm:.3f}  {m.tokens_per_second:,.0f} tokens/s  {m.samples_per_second:,.1f} samples/s"
            f"  ETA {minutes}:{seconds:02d}"
        )

    def close(self) -> None:
        """Close the file."""
        if self.file:
            self.file.close()
