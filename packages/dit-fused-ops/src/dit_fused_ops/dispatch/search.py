"""Measure the candidates of one call: right first, then fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.dispatch.backend import Backend, C
from dit_fused_ops.dispatch.op import Op, Probe
from dit_fused_ops.dispatch.store import Decision

# The largest error of a right kernel, in units of the largest number of the reference. A fused kernel rounds once or
# twice on the way (attention rounds the weights): a few units in the last place of the dtype, 2^-8 of bfloat16, 2^-11
# of float16; float32 sums of some 10^4 terms in another order differ by 10^-6.
ERROR_BOUND = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2e-5, torch.float64: 1e-12}

WARM_UPS = 2
ROUNDS = 7
SLOW_SECONDS = 0.2  # one call of this length is timed in fewer rounds
SLOW_ROUNDS = 3

# An earlier backend of the table stays the choice unless a later one is faster by more than noise.
MARGIN = 0.03


def search(op: Op[C], call: C, tensors: Sequence[Tensor | None], candidates: Sequence[Backend[C]]) -> Decision:
    """Compare each candidate with the reference, then time the right ones in turns; forward only.

    Devices are synchronised here, and nowhere else. A candidate that raises, or is wrong, is kept out with the reason.
    """
    given = [None if tensor is None else tensor.detach() for tensor in tensors]
    with torch.no_grad():
        probe = op.probe(call, *given)
        rejected: dict[str, str] = {}
        right: list[Callable[[], Any]] = []
        names: list[str] = []
        for backend in candidates:
            run = _bound(backend, call, given)
            reason = _fault(run, probe, call.dtype)
            if reason is not None:
                rejected[backend.name] = reason
                continue
            right.append(run)
            names.append(backend.name)
        seconds = time_in_turns(right, call.device)
    return Decision(ranking=_ranked(names, seconds), rejected=rejected)


def time_in_turns(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Return the median time of each of `runs` in seconds, measured round by round so that all see the same machine."""
    longest = 0.0
    for run in runs:
        for _ in range(WARM_UPS):
            longest = max(longest, _seconds(run, device))
    rounds = SLOW_ROUNDS if longest > SLOW_SECONDS else ROUNDS
    taken = [[_seconds(run, device) for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference in units of the largest finite number of `wanted`; NaN where only one has it."""
    if got.shape != wanted.shape:
        return float("inf")
    got, wanted = got.to(wanted.dtype), wanted
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    error = torch.where(same, 0.0, (got - wanted).abs()).max() if same.numel() else torch.zeros(())
    finite = wanted[wanted.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return float(error.item()) / max(largest, 1e-30)


def _fault(run: Callable[[], Any], probe: Probe, dtype: torch.dtype) -> str | None:
    try:
        error = relative_error(probe.select(run()), probe.wanted)
    except Exception as failure:  # noqa: BLE001 (what a kernel raises on this machine keeps it out, and is recorded)
        return f"it raised {type(failure).__name__}: {str(failure)[:200]}"
    if not error <= ERROR_BOUND[dtype]:
        return f"its error is {error:.1e} of the largest number, {ERROR_BOUND[dtype]:.1e} is allowed"
    return None


def _bound(backend: Backend[C], call: C, tensors: Sequence[Tensor | None]) -> Callable[[], Any]:
    return lambda: backend.run(call, *tensors)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    before, after = (torch.Event(device, enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def _ranked(names: Sequence[str], seconds: Sequence[float]) -> tuple[tuple[str, float], ...]:
    order = sorted(range(len(names)), key=lambda index: seconds[index])
    if order:
        limit = seconds[order[0]] * (1 + MARGIN)
        first = min(index for index in order if seconds[index] <= limit)
        order = [first, *(index for index in order if index != first)]
    return tuple((names[index], round(seconds[index] * 1e6, 2)) for index in order)
