"""Checkpoints: saved whole or not at all, beside training, and resumed bit for bit in the same layout.

::

    with StopSignals() as signals:
        checkpoints = Checkpoints(run, config.output, signals)
        if found := newest(directory):
            checkpoints.resume(found)
        for step in …:
            …
            checkpoints.after(step, score)

Formats: :mod:`~mm_finetune.checkpointing.files` (safetensors with checksums, one file a process) holding
:mod:`~mm_finetune.checkpointing.pieces`. Not megatron's own ``dist_checkpointing``: it gathers the distributed
optimizer's state on one rank of each data-parallel group while training waits, starts processes for every save, and
reads pickles.
"""

from mm_finetune.checkpointing.resume import Resume, compare, data_marks, model_marks, newest
from mm_finetune.checkpointing.saving import Checkpoints, Run
from mm_finetune.checkpointing.signals import StopSignals

__all__ = ["Checkpoints", "Resume", "Run", "StopSignals", "compare", "data_marks", "model_marks", "newest"]
