"""Proof that a contract test can fail: each argument of each operator call is made wrong in turn, in flight.

    calls = record(numbers)                       # the vendor's operators that `numbers` calls
    for index, call in enumerate(calls):
        for change in changes(call):
            assert noticed(change, index, (shapes, numbers))

`shapes` and `numbers` are checks: functions that run our code and raise when something is wrong, the first on fake
`npu` tensors through the vendor's shape functions, the second on CPU tensors through `semantics`. While a check runs,
the operator call with that index gets the wrong argument. What nobody can notice is listed by the test, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NAMESPACES = ("npu", "mindiesd")
LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "BNSD_BSND", "TND")
MODES = ("half", "interleave")
APPROXIMATIONS = ("none", "tanh")
INT_MAX = 2**31 - 1
CHOICES = range(5)  # numbers below that are taken for a choice: a mode, a flag, a precision
# How a check says no: its own assertion, torch's schema or shape function, our model of the operator.
COMPLAINTS = (AssertionError, RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError)

Arguments = Mapping[str, Any]
Check = Callable[[], object]


@dataclass(frozen=True)
class OpCall:
    """A call of a vendor's operator; the arguments that were given, by their names in the schema."""

    op: torch._ops.OpOverload
    arguments: Arguments

    @property
    def name(self) -> str:
        """`namespace::operator`."""
        return self.op._schema.name

    @property
    def defaults(self) -> dict[str, Any]:
        """Of the arguments that may be left out."""
        return {each.name: each.default_value for each in self.op._schema.arguments if each.has_default_value()}


@dataclass(frozen=True)
class Change:
    """One argument made wrong.

    Attributes:
        op: `namespace::operator`.
        argument: its name.
        what: what is done to it, in words.
        apply: the arguments with the change.
    """

    op: str
    argument: str
    what: str
    apply: Callable[[Arguments], dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.op} {self.argument}: {self.what}"


class _Intercepted(TorchFunctionMode):
    """Hands each call of a vendor's operator to `carry_out`."""

    def __init__(self, carry_out: Callable[[OpCall], Any]) -> None:
        super().__init__()
        self._carry_out = carry_out

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        op = getattr(func, "default", func)
        if not isinstance(op, torch._ops.OpOverload) or op.namespace not in NAMESPACES:
            return func(*args, **given)
        names = [each.name for each in op._schema.arguments]
        return self._carry_out(OpCall(op, {**dict(zip(names, args, strict=False)), **given}))


def record(check: Check) -> list[OpCall]:
    """The vendor's operators that `check` calls, in their order."""
    calls: list[OpCall] = []

    def carry_out(call: OpCall) -> Any:
        calls.append(call)
        return call.op(**call.arguments)

    with _Intercepted(carry_out):
        check()
    return calls


def noticed(change: Change, index: int, checks: Iterable[Check]) -> bool:
    """Whether one of the checks complains when its operator call number `index` gets the change."""
    return any(_complains(change, index, check) for check in checks)


def _complains(change: Change, index: int, check: Check) -> bool:
    seen = -1

    def carry_out(call: OpCall) -> Any:
        nonlocal seen
        seen += 1
        return call.op(**(change.apply(call.arguments) if seen == index else call.arguments))

    with _Intercepted(carry_out):
        try:
            check()
        except COMPLAINTS:
            return True
    assert seen >= index, f"the check makes {seen + 1} operator calls, none has the number {index}"
    return False


def changes(call: OpCall) -> Iterator[Change]:
    """Every way to make one argument of the call wrong: its name, its presence, its value, its place."""
    for name, value in call.arguments.items():
        yield Change(call.name, name, "wrong name", partial(_renamed, name))
        if name not in call.defaults or call.defaults[name] != value:
            yield Change(call.name, name, "left out", partial(_without, name))
        for what, wrong in _wrong_values(value):
            yield Change(call.name, name, what, partial(_replaced, name, wrong))
    tensors = [(name, value) for name, value in call.arguments.items() if isinstance(value, Tensor)]
    for (one, first), (two, second) in pairwise(tensors):
        if first.shape == second.shape and first.dtype == second.dtype and first is not second:
            yield Change(call.name, one, f"exchanged with {two}", partial(_exchanged, one, two))


def _renamed(name: str, given: Arguments) -> dict[str, Any]:
    return {**_without(name, given), f"{name}_": given[name]}


def _without(name: str, given: Arguments) -> dict[str, Any]:
    return {each: value for each, value in given.items() if each != name}


def _replaced(name: str, wrong: Callable[[Any], Any], given: Arguments) -> dict[str, Any]:
    return {**given, name: wrong(given[name])}


def _exchanged(one: str, two: str, given: Arguments) -> dict[str, Any]:
    return {**given, one: given[two], two: given[one]}


Wrong = Iterator[tuple[str, Callable[[Any], Any]]]


def _wrong_values(value: Any) -> Wrong:
    if isinstance(value, Tensor):
        yield from _wrong_tensors(value)
    elif isinstance(value, bool):
        yield "flipped", lambda given: not given
    elif isinstance(value, int):
        yield from ((str(other), partial(_instead, other)) for other in _other_integers(value))
    elif isinstance(value, float):
        yield "doubled", lambda given: 2 * given
        yield "zero", lambda given: 0.0
    elif isinstance(value, str):
        vocabulary = next((words for words in (LAYOUTS, MODES, APPROXIMATIONS) if value in words), ())
        yield from ((word, partial(_instead, word)) for word in (*vocabulary, "XXXX") if word != value)
    elif isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value):
        yield "first number one more", lambda given: [given[0] + 1, *given[1:]]
        yield "last number one less", lambda given: [*given[:-1], given[-1] - 1]
        yield "one number short", lambda given: list(given[1:])
    elif isinstance(value, (list, tuple)):
        yield "one short", lambda given: list(given[1:])
        yield "turned round", lambda given: list(given[::-1])


def _instead(other: Any, given: Any) -> Any:
    return other


def _other_integers(value: int) -> list[int]:
    if value in CHOICES:
        return [each for each in CHOICES if each != value]
    # The greatest int means "no bound"; a bound one less is none either.
    return [0] if value == INT_MAX else [0, value - 1, value + 1]


def _wrong_tensors(value: Tensor) -> Wrong:
    for dim in range(value.dim() - 1):
        if max(value.shape[dim : dim + 2]) > 1:
            yield f"dimensions {dim} and {dim + 1} exchanged", partial(_transposed, dim)
    if value.dim():
        yield "last dimension one short", lambda t: t[..., :-1].contiguous()
    yield "one more dimension", lambda t: t[None]
    if value.is_floating_point():
        wrong = torch.float16 if value.dtype != torch.float16 else torch.float32
        yield f"in {wrong}", partial(Tensor.to, dtype=wrong)
        yield "negated", torch.neg
    elif value.dtype in (torch.bool, torch.int8, torch.uint8):
        yield "inverted", lambda t: (t == 0).to(t.dtype)
        yield "in float32", torch.Tensor.float
    else:
        yield "one more", lambda t: t + 1
        yield "in int32", torch.Tensor.int


def _transposed(dim: int, tensor: Tensor) -> Tensor:
    return tensor.transpose(dim, dim + 1).contiguous()
