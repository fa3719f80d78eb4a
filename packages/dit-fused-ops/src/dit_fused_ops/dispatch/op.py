"""An op: how a call of it is described and checked, its reference, and the backends that compete for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor

from dit_fused_ops.dispatch.backend import Backend, C


def spread_rows(rows: int, wanted: int, device: torch.device) -> Tensor:
    """Return up to `wanted` of `rows` indices, the first and the last among them; for a `Probe`."""
    count = min(rows, wanted)
    return torch.arange(count, device=device) * (rows - 1) // max(count - 1, 1)


@dataclass(frozen=True)
class Probe:
    """What a candidate must reproduce before it may win.

    Attributes:
        select: takes the compared part out of an output of the op.
        wanted: that part as the reference computes it, float32 or better.
    """

    select: Callable[[Any], Tensor]
    wanted: Tensor


@dataclass(frozen=True, kw_only=True)
class Op(Generic[C]):
    """One op of the table.

    Attributes:
        name: the public function's.
        describe: `describe(tensors, options)` checks every argument and returns the call; raises `ParametersInvalid`.
        backends: in the order of preference when nothing was measured. The last one is the reference: it takes every
            legal call, and competes with nobody.
        probe: `probe(call, *tensors)` computes the reference on as much of the call as is affordable.
        autocast_tensors: how many leading tensors autocast casts; 0 when the op keeps the dtype that it is given.
    """

    name: str
    describe: Callable[[tuple[Tensor | None, ...], tuple[Any, ...]], C]
    backends: tuple[Backend[C], ...]
    probe: Callable[..., Probe]
    autocast_tensors: int = 0

    def backend(self, name: str) -> Backend[C] | None:
        """Return the backend of this name, or None."""
        return next((backend for backend in self.backends if backend.name == name), None)
