"""Measure beforehand, so that no run has to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_fused_ops.cases import TUNED, Case, Shape, cases
from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.dispatch.store import Decision, default_path, read_decisions
from dit_fused_ops.errors import ParametersInvalid, TuningFileError


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came out for one call."""

    shape: Shape
    case: Case
    decision: Decision

    def __str__(self) -> str:
        head = f"{self.shape} {self.case.op} {self.case.what}: "
        if not self.decision.ranking:
            return head + "no choice"
        (best, time), *others = self.decision.ranking
        rest = "".join(f", {name} {microseconds / time:.2f}x" for name, microseconds in others)
        return f"{head}{best} {time / 1000:.3f} ms{rest}"

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: the shape, the call, its bytes and operations, and the times in microseconds."""
        return {
            "shape": str(self.shape),
            "op": self.case.op,
            "what": self.case.what,
            "moved_bytes": self.case.moved,
            "matmul_operations": self.case.computed,
            "microseconds": dict(self.decision.ranking),
            "rejected": dict(self.decision.rejected),
        }


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is measured on, in which dtype, and where the decisions go.

    Attributes:
        device: of the tensors.
        dtype: of the tensors.
        thorough: whether backends whose first call takes seconds take part.
        file: the tuning file, added to.
        ops: public functions that are measured; none given means all.
    """

    device: torch.device
    dtype: torch.dtype
    thorough: bool
    file: Path
    ops: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, *, device: str | None, dtype: str, thorough: bool, file: Path | None, ops: Iterable[str] = ()
    ) -> Tuning:
        """Make it of what a command line gives.

        Raises:
            ParametersInvalid: there is no such device here, or no such op in `TUNED`.
            TuningFileError: `file` is there and is no tuning file, or it cannot be written.
        """
        if unknown := set(ops) - set(TUNED):
            raise ParametersInvalid(f"ops hold {', '.join(sorted(unknown))}, legal are {', '.join(TUNED)}")
        return cls(
            device=_device(device),
            dtype=getattr(torch, dtype),
            thorough=thorough,
            file=_usable(file or default_path()),
            ops=frozenset(ops),
        )

    def measure(self, shapes: Iterable[Shape]) -> Iterator[Measured]:
        """Measure every call of every shape anew, and yield it when its decision is kept."""
        with dispatcher.configured(mode="runtime", deterministic=False, thorough=self.thorough, file=self.file):
            for shape in shapes:
                for case in cases(shape, self.dtype, self.device, self.ops):
                    with torch.no_grad(), dispatcher.measuring_anew() as decisions:
                        case.run()
                    yield Measured(shape=shape, case=case, decision=decisions[-1])


def _usable(file: Path | None) -> Path:
    """The file, when it can be added to: what was named is neither thrown away nor, at the end, not there."""
    if file is None:
        raise TuningFileError("this user has no home folder to keep decisions in; name a file with --file")
    file = file.expanduser()
    read_decisions(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.parent.joinpath(f"{file.name}.lock").open("a", encoding="utf-8"):
            return file
    except OSError as error:
        raise TuningFileError(f"decisions cannot be kept in {file}: {error}; name another file") from error


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # torch says AssertionError where it was built without a device
        raise ParametersInvalid(f"device is {name!r}, and this machine has no such device: {error}") from error
