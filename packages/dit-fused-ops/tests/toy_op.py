"""An op with backends that are right, wrong, broken or picky, which count how often they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_fused_ops.arguments import require_tensor, wants_grad
from dit_fused_ops.dispatch import Backend, Call, Op, Probe, Rule, bucket


@dataclass(frozen=True, kw_only=True)
class DoubleCall(Call):
    """Twice x; `times` other than 2 is the feature "times"."""

    length: int
    times: int

    @property
    def features(self) -> frozenset[str]:
        return frozenset({"times"} if self.times != 2 else ())

    @property
    def shape_key(self) -> str:
        return f"{bucket(self.length)} times {self.times}"


class Doubling:
    """The op, and how often it was described and each backend ran.

    Args:
        backends: names of those below, in the order of preference; the reference comes last by itself.
        casts: how many tensors autocast casts.
    """

    def __init__(self, *backends: str, casts: int = 0) -> None:
        self.runs: Counter[str] = Counter()
        known = {
            "right": self._backend("right", lambda call, x: x + x),
            "wrong": self._backend("wrong", lambda call, x: x * 2.5),
            "broken": self._backend("broken", _break),
            "picky": self._backend("picky", lambda call, x: x + x, rules=(Rule(_is_long, "x must be longer than 9"),)),
            "costly": self._backend("costly", lambda call, x: x + x, costly=True),
            "opaque": self._backend("opaque", lambda call, x: x + x, traceable=False),
            "no_gradient": self._backend("no_gradient", lambda call, x: x + x, differentiable=False),
            "plain": self._backend("plain", _multiply, honours=frozenset({"times"})),
            "reference": self._backend("reference", _multiply, honours=frozenset({"times"})),
        }
        self.op: Op[DoubleCall] = Op(
            name="double",
            describe=self._describe,
            backends=tuple(known[name] for name in (*backends, "reference")),
            probe=lambda call, x: Probe(select=lambda output: output, wanted=x.float() * call.times),
            autocast_tensors=casts,
        )

    def _backend(self, name: str, compute: Callable[..., Any], **conditions: Any) -> Backend[DoubleCall]:
        def run(call: DoubleCall, x: Tensor) -> Any:
            self.runs[name] += 1
            return compute(call, x)

        return Backend(name=name, run=run, **conditions)

    def _describe(self, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> DoubleCall:
        self.runs["describe"] += 1
        x = require_tensor(tensors[0], "x")
        return DoubleCall(device=x.device, dtype=x.dtype, needs_grad=wants_grad(x), length=x.numel(), times=options[0])


def _multiply(call: DoubleCall, x: Tensor) -> Tensor:
    return x * call.times


def _break(call: DoubleCall, x: Tensor) -> Tensor:
    raise RuntimeError("this machine cannot")


def _is_long(call: DoubleCall) -> bool:
    return call.length > 9
