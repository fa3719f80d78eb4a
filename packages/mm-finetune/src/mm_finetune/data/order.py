"""Which samples a step takes: a function of the seed and the step alone.

The epochs stand one behind the other, each a permutation of its own; a step takes the next `global_batch_size` places.
So every sample is seen once an epoch, none is dropped at the end of one, and a step that reaches the end goes on with
the beginning of the next epoch: every step has the same number of samples. Neither the number of processes nor that of
workers, nor packing or micro-batches, play a part, and a run that resumes at step n needs to remember n alone.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray


def order(count: int, *, seed: int, epoch: int) -> list[int]:
    """The places of an epoch: a permutation of 0 to `count` - 1 that depends on the seed and the epoch alone."""
    places: list[int] = _permutation(count, seed, epoch).tolist()
    return places


# Steps come one after the other, and a step rarely spans more than two epochs.
@lru_cache(maxsize=3)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    permutation: NDArray[np.int64] = torch.randperm(count, generator=generator).numpy()
    permutation.flags.writeable = False
    return permutation


def step_numbers(count: int, step: int, *, global_batch_size: int, seed: int | None) -> list[int]:
    """The places of a step (from 1) in the data set, in order.

    Args:
        count: samples of the data set, 1 or more.
        step: number of the step, from 1.
        global_batch_size: samples a step.
        seed: of the order; None: as they stand.
    """
    first = (step - 1) * global_batch_size
    places = range(first, first + global_batch_size)
    if seed is None:
        return [place % count for place in places]
    return [int(_permutation(count, seed, place // count)[place % count]) for place in places]
