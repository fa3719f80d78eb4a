"""Learning rate as a function of the step: linear warm-up, then cosine."""

from __future__ import annotations

import math


def learning_rate(step: int, *, steps: int, lr: float, min_lr: float = 0.0, warmup_steps: int = 0) -> float:
    """The learning rate of a step.

    Args:
        step: number of the step, from 1. Unlike Megatron's, the first step already moves.
        steps: steps of the run.
        lr: peak, reached at step `warmup_steps`.
        min_lr: approached at the end, reached one step after the last, so that no step is wasted.
        warmup_steps: steps of linear warm-up.
    """
    if step <= warmup_steps:
        return lr * step / warmup_steps
    done = (step - warmup_steps) / (steps + 1 - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * done)) / 2
