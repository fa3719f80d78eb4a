"""The line of a step, for people and for people's scripts."""

from __future__ import annotations

from datetime import datetime
from itertools import islice

from mm_finetune.watching.metrics import Metrics


def plain_line(m: Metrics, steps: int) -> str:
    """For people."""
    parts = [
        f"step {m.step:>{len(str(steps))}}/{steps}",
        f"loss {m.loss:.4f}",
        f"lr {m.lr:.2e}",
        f"grad norm {m.grad_norm:.3f}",
        f"{m.tokens_per_second:,.0f} tokens/s",
        f"{m.samples_per_second:,.1f} samples/s",
        "" if m.mfu is None else f"MFU {m.mfu:.1%}",
        f"data wait {m.data_wait:.0%}",
        "" if m.memory_gib is None else f"{m.memory_gib:.1f} GiB",
        f"ETA {duration(m.eta_s)}",
        *(f"{name} {value:.3f}" for name, value in _shown(m)),
        "SKIPPED" if m.skipped else "",
    ]
    return "  ".join(part for part in parts if part)


def megatron_line(
    m: Metrics, steps: int, *, consumed: int, tokens_per_sample: bool, skipped: int, nans: int, now: datetime
) -> str:
    """Megatron's training line, as MindSpeed MM prints it: the fifth field between colons begins with the step's ms.

    Unlike there, a loss that is no number is shown.

    Args:
        m: the step.
        steps: steps of the run.
        consumed: samples seen since the start of the run.
        tokens_per_sample: put that field in, as ``--log-tps`` does.
        skipped: steps so far that left the weights alone.
        nans: steps so far whose loss was no number.
        now: when.
    """
    parts = [
        f" [{now:%Y-%m-%d %H:%M:%S}] iteration {m.step:8d}/{steps:8d}",
        f"consumed samples: {consumed:12d}",
        f"elapsed time per iteration (ms): {m.step_s * 1000:.1f}",
        f"learning rate: {m.lr:.6E}",
        f"global batch size: {m.samples:5d}",
        f"tokens per sample: {m.tokens / m.samples:.2E}" if tokens_per_sample else "",
        f"loss: {m.loss:.6E}",
        "loss scale: 1.0",
        f"grad norm: {m.grad_norm:.3f}",
        *(f"{name}: {value:.4f}" for name, value in _shown(m)),
        f"number of skipped iterations: {skipped:3d}",
        f"number of nan iterations: {nans:3d}",
    ]
    return " | ".join(part for part in parts if part) + " |"


def _shown(m: Metrics) -> list[tuple[str, float]]:
    return [(name.replace("_", " "), value) for name, value in islice(m.more.items(), 2)]


def duration(seconds: float) -> str:
    """``0:42``, ``12:05``, ``3:07:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
