"""The numbers of a step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One step; ``metrics.jsonl`` holds one a line. Times in seconds.

    Attributes:
        step: number of the step, from 1.
        loss: of the whole global batch.
        lr: learning rate that the step used.
        grad_norm: before clipping.
        tokens: of the whole global batch, without padding.
        samples: of the whole global batch.
        step_s: how long the step took.
        data_wait: share of that time that the devices waited for data, 0 to 1.
        mfu: share of the devices' peak that the model's arithmetic used, 0 to 1; None where the peak is not known.
        memory_gib: most memory that rank 0 held so far: on its accelerator, or of the process on a CPU.
        elapsed_s: since the run started; goes on where a resumed run left off.
        eta_s: until the last step, at the pace so far.
        skipped: the step left the weights as they were; ``anomalies.jsonl`` says why.
        more: what else the objective says of the step, by name; the first two stand in the console line too.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    samples: int
    step_s: float
    tokens_per_second: float
    samples_per_second: float
    data_wait: float
    mfu: float | None
    memory_gib: float | None
    elapsed_s: float
    eta_s: float
    skipped: bool = False
    more: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """All of it, flat."""
        row = {**vars(self), **self.more}
        del row["more"]
        return row

    def values(self) -> dict[str, float]:
        """What a curve can be drawn of, by name."""
        left_out = {"step", "skipped", "elapsed_s", "eta_s"}
        return {k: float(v) for k, v in self.row().items() if k not in left_out and v is not None}


def json_line(values: dict[str, Any]) -> bytes:
    """One line of JSON that every parser reads: a number that is none becomes null."""
    safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return (json.dumps(safe, allow_nan=False, ensure_ascii=False) + "\n").encode()
