"""Random number generators of a process: Python's, numpy's, torch's, the accelerator's, Megatron's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRACKER = "tracker."


def random_tensors() -> dict[str, Tensor]:
    """The states that are tensors, by name."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tensors = {"torch": torch.get_rng_state()}
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        tensors["device"] = torch.get_device_module().get_rng_state()
    states: dict[str, Any] = get_cuda_rng_tracker().get_states()
    tensors |= {TRACKER + name: state for name, state in states.items() if isinstance(state, Tensor)}
    # Copied: a generator goes on while they are written.
    return {name: state.to("cpu", copy=True) for name, state in tensors.items()}


def random_notes() -> dict[str, Any]:
    """The states that are numbers."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def set_random(tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Go on with states that the two functions above gave."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, numbers, gauss = notes["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = notes["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    tracker = get_cuda_rng_tracker()
    states = {n.removeprefix(TRACKER): state for n, state in tensors.items() if n.startswith(TRACKER)}
    if states:
        tracker.set_states(states)
    torch.set_rng_state(tensors["torch"])
    if "device" in tensors:
        torch.get_device_module().set_rng_state(tensors["device"])
