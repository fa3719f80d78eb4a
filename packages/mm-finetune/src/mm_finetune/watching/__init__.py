"""What a run says of itself while it goes on, all by rank 0.

:class:`RunLog` measures steps and writes the console line, ``metrics.jsonl`` and the trackers.
:class:`Guard` decides whether a step may touch the weights, and writes ``anomalies.jsonl``.
:func:`step_flops` says what a step costs, for MFU: some :class:`Work` in a model of a :class:`ModelShape`, of which
:class:`Backward` says what trains.

Nothing here imports torch before it is needed.
"""

from mm_finetune.watching.anomalies import Guard
from mm_finetune.watching.flops import Backward, ModelShape, Work, step_flops
from mm_finetune.watching.memory import device_peak_tflops, memory_bytes
from mm_finetune.watching.metrics import Metrics
from mm_finetune.watching.run_log import RunLog
from mm_finetune.watching.trackers import Tracker, open_trackers, require_trackers

__all__ = [
    "RunLog",
    "Metrics",
    "Guard",
    "ModelShape",
    "Work",
    "Backward",
    "step_flops",
    "device_peak_tflops",
    "memory_bytes",
    "Tracker",
    "open_trackers",
    "require_trackers",
]
