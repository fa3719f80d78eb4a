"""What can be used on this machine, and the reason for the rest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_fused_ops.dispatch.backend import Backend, dtype_names
from dit_fused_ops.table import OPS


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One backend of one op.

    Attributes:
        op: the public function.
        backend: its name in `backend=`, `op_type=` and the tuning file.
        reason: why it cannot be used here, or None.
        devices: types of device that it runs on; empty for any.
        dtypes: of the main tensor.
        honours: arguments out of the ordinary that it carries out.
        limits: what shapes must be like, in words.
        gradient: whether it has one.
        note: what else there is to know.
    """

    op: str
    backend: str
    reason: str | None
    devices: tuple[str, ...]
    dtypes: str
    honours: tuple[str, ...]
    limits: tuple[str, ...]
    gradient: bool
    note: str


class Capabilities(tuple[Capability, ...]):
    """All of them, in the order of the table; as text, a table to read."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max(len(each.backend) for each in self)
        lines: list[str] = []
        for op in dict.fromkeys(each.op for each in self):
            lines.append(op)
            lines += [f"  {each.backend:{width}}  {_verdict(each)}" for each in self if each.op == op]
        return "\n".join(lines)

    __repr__ = __str__

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return plain dictionaries, for JSON."""
        return [asdict(each) for each in self]


def capabilities() -> Capabilities:
    """Say for each op which backends can be used on this machine and, for the others, why not."""
    here = {"cpu"}
    if torch.accelerator.is_available() and (current := torch.accelerator.current_accelerator()) is not None:
        here.add(current.type)
    return Capabilities(_capability(op.name, backend, here) for op in OPS for backend in op.backends)


def _capability(op: str, backend: Backend[Any], here: set[str]) -> Capability:
    reason = backend.missing()
    if backend.devices is not None and not backend.devices & here:
        reason = (
            f"it runs on {' and '.join(sorted(backend.devices))}, and this machine has {' and '.join(sorted(here))}"
        )
    return Capability(
        op=op,
        backend=backend.name,
        reason=reason,
        devices=tuple(sorted(backend.devices or ())),
        dtypes=dtype_names(backend.dtypes),
        honours=tuple(sorted(backend.honours)),
        limits=tuple(rule.otherwise for rule in backend.rules),
        gradient=backend.differentiable,
        note=backend.note,
    )


def _verdict(each: Capability) -> str:
    if each.reason is not None:
        return f"no: {each.reason}"
    limits = f"; may refuse: {'; '.join(each.limits)}" if each.limits else ""
    note = f" ({each.note})" if each.note else ""
    return f"yes{note}: {each.dtypes}{'' if each.gradient else ', no gradient'}{limits}"
