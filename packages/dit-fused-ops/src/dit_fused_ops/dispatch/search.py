"""Measure the candidates of one call: right first, then fast."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.dispatch.backend import Backend, C, Call
from dit_fused_ops.dispatch.op import Op
from dit_fused_ops.dispatch.store import Decision

# The largest error of a right kernel, in units of the largest number of the reference. A fused kernel rounds once or
# twice on the way (attention rounds the weights): a few units in the last place of the dtype, 2^-8 of bfloat16, 2^-11
# of float16; float32 sums of some 10^4 terms in another order differ by 10^-6.
ERROR_BOUND = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2e-5, torch.float64: 1e-12}

# Where the user lets matrix products of float32 round their factors to TF32, whose precision is 2^-11.
REDUCED_BOUND = 2.0**-8

# Numbers may be harder than that: a norm of values far from 0, an attention that is nearly a choice. A kernel may then
# be as far from float64 as a few float32 references are. Where the reference itself is that far off, nothing is learnt.
REFERENCE_ERRORS = 4
TELLING = 0.05

WARM_UPS = 2
ROUNDS = 7
SLOW_SECONDS = 0.2  # one call of this length is timed in fewer rounds
SLOW_ROUNDS = 3
BURST_SECONDS = 1e-3  # short calls are timed in bursts of this length, as they come in a model: one behind the other
MOST_IN_A_BURST = 50

# An earlier backend of the table stays the choice unless a later one is faster by more than noise.
MARGIN = 0.03


def search(op: Op[C], call: C, tensors: Sequence[Tensor | None], candidates: Sequence[Backend[C]]) -> Decision | None:
    """Compare each candidate with the reference, then time the right ones in turns; forward only.

    Devices are synchronised here, and nowhere else. A candidate that raises, or is wrong, is kept out with the reason.
    None says that these numbers, all zeros for instance, do not tell right from wrong.
    """
    given = [None if tensor is None else tensor.detach() for tensor in tensors]
    # A candidate that fails warns as it likes: the reason is kept.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = _Truth(op, call, given)
        rejected: dict[str, str] = {}
        right: list[Callable[[], Any]] = []
        names: list[str] = []
        for backend in candidates:
            run = _bound(backend, call, given)
            reason = _fault(run, truth)
            if reason is not None:
                rejected[backend.name] = reason
                continue
            right.append(run)
            names.append(backend.name)
        if not truth.tells:
            return None
        seconds = time_in_turns(right, call.device)
    lasting = not any(torch.OutOfMemoryError.__name__ in reason for reason in rejected.values())
    return Decision(ranking=_ranked(names, seconds), rejected=rejected, lasting=lasting)


class _Truth:
    """What candidates must reproduce: the float32 reference, and where that is in doubt the same in float64."""

    def __init__(self, op: Op[Any], call: Call, tensors: Sequence[Tensor | None]) -> None:
        self._op, self._call, self._tensors = op, call, tensors
        self._bound = ERROR_BOUND[call.dtype]
        if call.dtype == torch.float32 and call.device.type == "cuda" and _rounded_products():
            self._bound = REDUCED_BOUND
        with _exact_products(call.device):
            self._probe = op.probe(call, *tensors)
        self.tells = True

    def fault_of(self, output: Any) -> str | None:
        """Say what is wrong with an output of the op, or None."""
        got = self._probe.select(output)
        if relative_error(got, saturated(self._probe.wanted, got.dtype)) <= self._bound:
            return None
        exact, own_error = self._exact
        self.tells = own_error < TELLING
        allowed = self._bound + REFERENCE_ERRORS * own_error
        error = relative_error(got, saturated(exact, got.dtype))
        if error <= allowed:
            return None
        return f"its error is {error:.1e} of the largest number, {allowed:.1e} is allowed"

    @functools.cached_property
    def _exact(self) -> tuple[Tensor, float]:
        """The float64 truth, and the error of the float32 reference; accelerators without float64 have to trust it."""
        if self._call.device.type not in ("cpu", "cuda"):
            return self._probe.wanted, 0.0
        wide = [each.double() if each is not None and each.is_floating_point() else each for each in self._tensors]
        exact = self._op.probe(self._call, *wide).wanted
        return exact, relative_error(self._probe.wanted, exact)


def _rounded_products() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Let no matrix product of the reference round its factors, whatever the program has allowed."""
    if device.type != "cuda" or not _rounded_products():
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def saturated(wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """Make infinite what `dtype` cannot hold: a right kernel overflows there too."""
    rounded = wanted.to(dtype)
    return torch.where(rounded.isinf(), rounded.to(wanted.dtype), wanted)


def time_in_turns(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Return the median time of each of `runs` in seconds, measured round by round so that all see the same machine."""
    warm = [min(_seconds(run, device, 1) for _ in range(WARM_UPS)) for run in runs]
    longest = max(warm, default=0.0)
    rounds = SLOW_ROUNDS if longest > SLOW_SECONDS else ROUNDS
    calls = max(1, min(MOST_IN_A_BURST, int(BURST_SECONDS / max(longest, 1e-9))))
    taken = [[_seconds(run, device, calls) for run in runs] for _ in range(rounds)]
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


def _fault(run: Callable[[], Any], truth: _Truth) -> str | None:
    try:
        return truth.fault_of(run())
    except Exception as failure:  # noqa: BLE001 (what a kernel raises on this machine keeps it out, and is recorded)
        return f"it raised {type(failure).__name__}: {str(failure)[:200]}"


def _bound(backend: Backend[C], call: C, tensors: Sequence[Tensor | None]) -> Callable[[], Any]:
    return lambda: backend.run(call, *tensors)


def _seconds(run: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds of one of so many calls, by the device's own clock where it has one."""
    if device.type == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls
    module = torch.get_device_module(device)
    with module.device(device):
        before, after = (module.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(calls):
            run()
        after.record()
        after.synchronize()
    return float(before.elapsed_time(after)) / 1000 / calls


def _ranked(names: Sequence[str], seconds: Sequence[float]) -> tuple[tuple[str, float], ...]:
    order = sorted(range(len(names)), key=lambda index: seconds[index])
    if order:
        limit = seconds[order[0]] * (1 + MARGIN)
        first = min(index for index in order if seconds[index] <= limit)
        order = [first, *(index for index in order if index != first)]
    return tuple((names[index], round(seconds[index] * 1e6, 2)) for index in order)
