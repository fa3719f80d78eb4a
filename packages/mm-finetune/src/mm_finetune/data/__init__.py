"""Records to micro-batches, the same ones whatever the number of processes, workers and rows.

In the order of a run:

* :mod:`.encoder` makes one record tokens, labels, positions and pixels (with :mod:`.truncation`);
* :mod:`.lengths` knows the length of all of them before the first step, from headers;
* :mod:`.order` says which records a step takes, :mod:`.packing` how they are laid out;
* :mod:`.prefetch` reads them ahead, :mod:`.faults` and :mod:`.exchange` keep processes in step when one can't be read;
* :mod:`.batches` lays them side by side, :mod:`.loader` hands them out.
"""

from __future__ import annotations

from mm_finetune.data.batches import Batch, EncodedSample, collate
from mm_finetune.data.dataset import Dataset
from mm_finetune.data.encoder import Encoder
from mm_finetune.data.exchange import Alone, Exchange, Processes
from mm_finetune.data.faults import BadRecords, Fault
from mm_finetune.data.lengths import Index
from mm_finetune.data.loader import Loader, LoaderSettings, StepData
from mm_finetune.data.order import order, step_numbers
from mm_finetune.data.packing import CostModel, Layout

__all__ = [
    "Dataset",
    "Encoder",
    "Loader",
    "LoaderSettings",
    "StepData",
    "Layout",
    "CostModel",
    "Batch",
    "EncodedSample",
    "collate",
    "order",
    "step_numbers",
    "Index",
    "BadRecords",
    "Fault",
    "Exchange",
    "Alone",
    "Processes",
]
