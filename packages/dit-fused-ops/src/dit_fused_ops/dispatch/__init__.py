"""Dispatch as data: an `Op` has `Backend`s, a `Call` says what is asked for, the `dispatcher` chooses and remembers."""

from dit_fused_ops.dispatch.backend import FLOATS, HALVES, Backend, Call, Rule, bucket
from dit_fused_ops.dispatch.choosing import Dispatcher, Settings, dispatcher, readable
from dit_fused_ops.dispatch.compiling import CompiledPerKind, compiled_backend
from dit_fused_ops.dispatch.op import Op, Probe, spread_rows

__all__ = [
    "Op",
    "Call",
    "Backend",
    "Rule",
    "Probe",
    "spread_rows",
    "FLOATS",
    "HALVES",
    "bucket",
    "compiled_backend",
    "CompiledPerKind",
    "Dispatcher",
    "Settings",
    "dispatcher",
    "readable",
]
