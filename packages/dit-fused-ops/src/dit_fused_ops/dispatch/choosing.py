"""Carry out a call: describe it once, choose a backend once, and from then on only look it up.

```
dispatch(op, tensors, options)
   signature seen before  ──────────────────────────────────────────────>  run(*tensors)
   else  op.describe -> call,  candidates = backends that do not refuse
         mode "static", or torch looks on (compile, export, func):  what the store remembers, else the first
         mode "runtime":  what the store remembers, else search, and remember
```
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch._C._functorch import peek_interpreter_stack

from dit_fused_ops.dispatch.backend import Backend, C
from dit_fused_ops.dispatch.machine import device_name, library_versions
from dit_fused_ops.dispatch.op import Op
from dit_fused_ops.dispatch.search import search
from dit_fused_ops.dispatch.store import Decision, Store, default_path
from dit_fused_ops.errors import BackendRefused, ParametersInvalid

MODES = ("runtime", "static")

# Signatures kept; a program with more shapes than that looks its decisions up again.
_SIGNATURES = 4096
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How backends are chosen.

    Attributes:
        mode: "runtime" measures the candidates at the first call of a kind; "static" never measures: it takes what
            the tuning file says, else the first backend in the order of the table.
        deterministic: nothing is measured in "runtime" either, so that two runs never differ by the choice.
        thorough: a search also tries backends whose first call takes seconds (`torch.compile`).
        file: the tuning file; None keeps decisions in memory.

    Raises:
        ParametersInvalid: a mode that there is not.
    """

    mode: str = "runtime"
    deterministic: bool = False
    thorough: bool = False
    file: Path | None = None

    def __post_init__(self) -> None:
        _known_mode(self.mode)
        if self.file is not None:
            object.__setattr__(self, "file", Path(self.file).expanduser())


class Dispatcher:
    """Chooses and remembers; `dit_fused_ops.dispatcher` is the one that the ops use."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._prepared: dict[Hashable, Callable[..., Any]] = {}
        self._settings = settings
        self._store: Store | None = None
        self._measured_anew: list[Decision] | None = None

    @property
    def settings(self) -> Settings:
        """The settings in force; without `configure`, those of the class with the user's tuning file."""
        if self._settings is None:
            self._settings = Settings(file=default_path())
        return self._settings

    @property
    def store(self) -> Store:
        """What was measured so far, here or by whoever wrote the tuning file."""
        if self._store is None:
            self._store = Store(self.settings.file)
        return self._store

    def configure(self, **changes: Any) -> None:
        """Change fields of `Settings`, for this process; what was chosen before is chosen anew.

        Raises:
            ParametersInvalid: there is no such field, or a mode that there is not.
        """
        legal = [field.name for field in fields(Settings)]
        if unknown := set(changes) - set(legal):
            raise ParametersInvalid(f"settings are {', '.join(legal)}, given {', '.join(sorted(unknown))}")
        self._settings = replace(self.settings, **changes)
        self.clear()

    @contextmanager
    def configured(self, **changes: Any) -> Iterator[Dispatcher]:
        """Change fields of `Settings` for a while."""
        before = self.settings
        self.configure(**changes)
        try:
            yield self
        finally:
            self._settings = before
            self.clear()

    @contextmanager
    def measuring_anew(self) -> Iterator[list[Decision]]:
        """Measure each kind of call that is made meanwhile, also where it is known, and list what came out."""
        self.clear()
        self._measured_anew = []
        try:
            yield self._measured_anew
        finally:
            self._measured_anew = None

    def clear(self) -> None:
        """Forget every choice; the tuning file stays, and is read again."""
        self._prepared.clear()
        self._store = None

    def __call__(
        self,
        op: Op[C],
        tensors: tuple[Tensor | None, ...],
        options: tuple[Any, ...],
        *,
        mode: str | None = None,
        named: str | None = None,
    ) -> Any:
        """Compute `op` of `tensors` with `options`, which must be hashable.

        Args:
            op: from the table.
            tensors: the tensors of the op in its order, None where one is left out.
            options: its other arguments, in the order that `op.describe` expects.
            mode: instead of that of the settings.
            named: a backend that must carry it out; it is never replaced by another.

        Raises:
            ParametersInvalid: an argument is wrong.
            BackendRefused: the named backend cannot carry out this call, or there is no such backend.
        """
        signature = None if torch.compiler.is_compiling() else _signature(op, tensors, options, mode, named)
        if signature is not None:
            try:
                prepared = self._prepared.get(signature)
            except TypeError:  # an option that cannot be hashed is a wrong one, and `describe` says so
                prepared = signature = None
            if prepared is not None:
                return prepared(*tensors)
        if (lower := _autocast(tensors)) is not None:
            return self._without_autocast(op, tensors, options, lower, mode=mode, named=named)
        call = op.describe(tensors, options)
        backend = self.choose(op, call, tensors if signature is not None else None, mode=mode, named=named)
        if signature is not None:
            self._remember(signature, functools.partial(backend.run, call))
        return backend.run(call, *tensors)

    def choose(
        self,
        op: Op[C],
        call: C,
        tensors: tuple[Tensor | None, ...] | None = None,
        *,
        mode: str | None = None,
        named: str | None = None,
    ) -> Backend[C]:
        """Return the backend for `call`; without `tensors` to measure with, a traceable one and nothing is measured."""
        mode = _known_mode(mode or self.settings.mode)
        if named is not None:
            return _by_name(op, call, named)
        if tensors is None or call.device.type == "meta" or not (tensors[0] is None or tensors[0].numel()):
            seen_through = [backend for backend in op.backends if backend.traceable and not backend.costly]
            return next(backend for backend in seen_through if backend.refuses(call) is None)
        candidates = [backend for backend in op.backends if backend.refuses(call) is None]
        key = f"{op.name} | {device_name(call.device)} | {call.key} | {library_versions()}"
        decision = self.store.get(key)
        if self._measured_anew is not None or (decision is None and self._measures(call, mode)):
            *contestants, reference = [each for each in candidates if self.settings.thorough or not each.costly]
            if len(contestants) < 2 and self._measured_anew is None:
                return (contestants or [reference])[0]
            decision = search(op, call, tensors, contestants)
            if decision is not None:
                self.store.put(key, decision)
                if self._measured_anew is not None:
                    self._measured_anew.append(decision)
        return _best(candidates, decision)

    def _measures(self, call: C, mode: str) -> bool:
        if mode != "runtime" or self.settings.deterministic:
            return False
        return not torch.are_deterministic_algorithms_enabled() and not _capturing(call.device)

    def _remember(self, signature: Hashable, run: Callable[..., Any]) -> None:
        if len(self._prepared) >= _SIGNATURES:
            self._prepared.clear()
        self._prepared[signature] = run

    def _without_autocast(
        self,
        op: Op[C],
        tensors: tuple[Tensor | None, ...],
        options: tuple[Any, ...],
        lower: tuple[str, torch.dtype],
        **how: Any,
    ) -> Any:
        """Cast as torch would for this kind of op, then compute as if autocast were off."""
        kind, dtype = lower
        cast = op.autocast_tensors
        given = (*(_lowered(tensor, dtype) for tensor in tensors[:cast]), *tensors[cast:])
        with torch.autocast(kind, enabled=False):
            return self(op, given, options, **how)


def _known_mode(mode: str) -> str:
    if mode not in MODES:
        raise ParametersInvalid(f"opt_mode is {mode!r}, legal are {', '.join(MODES)}")
    return mode


def _best(candidates: list[Backend[C]], decision: Decision | None) -> Backend[C]:
    """The first of the ranking that may run, else the first of the table that was not found wrong."""
    if decision is None:
        decision = Decision(ranking=())
    by_name = {backend.name: backend for backend in candidates}
    ranked = [by_name[name] for name, _ in decision.ranking if name in by_name]
    rest = [each for each in candidates if not each.costly and each.name not in decision.rejected]
    return (ranked or rest)[0]


def readable(*tensors: Tensor | None) -> bool:
    """Whether the numbers of the tensors can be read now: no wrapper of torch looks on, and no graph is captured."""
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return all(type(each) in _PLAIN and each.device.type != "meta" for each in given) and not _capturing(
        given[0].device
    )


def _signature(
    op: Op[C], tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], mode: str | None, named: str | None
) -> Hashable | None:
    """What decides how a call is carried out; None when a wrapper of torch looks on, or autocast is on."""
    # Inside torch.func tensors are wrapped, though their type is Tensor.
    if peek_interpreter_stack() is not None or _is_any_autocast_enabled():
        return None
    first = tensors[0]
    if type(first) not in _PLAIN or first is None:
        return None
    grad = torch.is_grad_enabled()
    # The index of a device is cheaper to look up than the device: once is enough for its type.
    parts: list[Any] = [op.name, options, mode, named, grad, first.device]
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        elif type(tensor) in _PLAIN:
            parts.append((tensor.shape, tensor.dtype, tensor.get_device(), grad and tensor.requires_grad))
        else:
            return None
    return tuple(parts)


def _autocast(tensors: tuple[Tensor | None, ...]) -> tuple[str, torch.dtype] | None:
    """Where autocast is on, and to which dtype it casts, if it is."""
    first = tensors[0]
    kind = first.device.type if isinstance(first, Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return kind, torch.get_autocast_dtype(kind)


def _lowered(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    castable = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable and tensor is not None else tensor


def _by_name(op: Op[C], call: C, name: str) -> Backend[C]:
    backend = op.backend(name)
    if backend is None:
        legal = ", ".join(each.name for each in op.backends)
        raise BackendRefused(f"{op.name} has no backend {name!r}, legal are {legal}")
    if reason := backend.refuses(call):
        open_to_it = ", ".join(each.name for each in op.backends if each.refuses(call) is None)
        raise BackendRefused(f"{op.name}: {name} cannot carry out this call: {reason}. These can: {open_to_it}")
    return backend


def _capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the device: nothing may be synchronised then."""
    if device.type == "cpu":
        return False
    asks = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return bool(asks()) if asks is not None else False


dispatcher = Dispatcher()
