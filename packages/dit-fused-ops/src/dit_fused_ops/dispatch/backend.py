"""What a call is, and what can carry it out: plain data that can say no."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
HALVES = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True, kw_only=True)
class Call:
    """Everything about one call of an op but its numbers; each op adds fields of its own.

    Attributes:
        device: where the tensors are.
        dtype: of the main tensor.
        needs_grad: whether a gradient may be asked for.
    """

    device: torch.device
    dtype: torch.dtype
    needs_grad: bool

    @property
    def features(self) -> frozenset[str]:
        """The arguments out of the ordinary that a backend must honour to be a candidate."""
        return frozenset()

    @property
    def shape_key(self) -> str:
        """What of shapes and arguments decides which backend is the fastest, in words; lengths are in buckets."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """What decides which backend is the fastest on one machine, in words for the tuning file."""
        gradient = " gradient" if self.needs_grad else ""
        return f"{dtype_names([self.dtype])} {self.shape_key}{gradient}"


C = TypeVar("C", bound=Call)


@dataclass(frozen=True)
class Rule(Generic[C]):
    """A condition on shapes or arguments, and the words that say so when it does not hold."""

    holds: Callable[[C], bool]
    otherwise: str


def always_there() -> str | None:
    """The `missing` of a backend that torch alone can run."""
    return None


@dataclass(frozen=True, kw_only=True)
class Backend(Generic[C]):
    """One way to compute an op, and when it may.

    Attributes:
        name: what users call it.
        run: `run(call, *tensors)`, with the tensors of the op in the op's own order and layout.
        devices: types of device it runs on; None for any.
        dtypes: of the main tensor.
        honours: the features that it carries out. One that it lacks makes it no candidate: no argument is ignored.
        rules: conditions on shapes, each with its reason.
        missing: why it cannot be had on this machine, or None.
        differentiable: whether gradients flow through it.
        traceable: whether torch.compile, torch.export and torch.func see through it.
        costly: whether its first call takes seconds; considered only in `tune`, and wherever it won there.
        note: what a user should know of it, for `capabilities`.
    """

    name: str
    run: Callable[..., Any]
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] = FLOATS
    honours: frozenset[str] = frozenset()
    rules: tuple[Rule[C], ...] = ()
    missing: Callable[[], str | None] = always_there
    differentiable: bool = True
    traceable: bool = True
    costly: bool = False
    note: str = ""

    def refuses(self, call: C) -> str | None:
        """Say why it cannot carry out `call`, in words for the user; None when it can."""
        if self.devices is not None and call.device.type not in self.devices:
            return f"it runs on {' and '.join(sorted(self.devices))}, the tensors are on {call.device.type}"
        if call.dtype not in self.dtypes:
            return f"it takes {dtype_names(self.dtypes)}, given {dtype_names([call.dtype])}"
        if call.needs_grad and not self.differentiable:
            return "it has no gradient; call it under torch.no_grad()"
        if unknown := call.features - self.honours:
            return f"it does not honour: {', '.join(sorted(unknown))}"
        for rule in self.rules:
            if not rule.holds(call):
                return rule.otherwise
        return self.missing()


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Name dtypes as users write them, without `torch.`."""
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def bucket(length: int) -> int:
    """Return the smallest 2^k · {4, 5, 6, 7} not under `length`: lengths within a quarter octave share a decision."""
    step = max(1, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
