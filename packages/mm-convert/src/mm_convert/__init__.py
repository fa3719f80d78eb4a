"""Hugging Face checkpoints to the Megatron-style layout of MindSpeed MM and back.

    >>> from mm_convert import Converter, Layout
    >>> layout = Layout(llm_pp_layers=[[12, 16]], vit_pp_layers=[[32, 0]], tp_size=1)
    >>> Converter.named("Qwen2_5_VLConverter").hf_to_mm("Qwen2.5-VL-7B-Instruct", "mm", layout)

`plan` and `execute` find the converter and the direction themselves. A conversion is planned from headers,
proved to use every byte and to make every byte once, and only then carried out. `Converter` does it for
folders, from Hugging Face, back, and from one Megatron layout to another (`resplit`); its `prepare_…` methods
plan without writing, and `forecast` says what a plan needs. `inspect` names what a folder is, `verify` compares
two of any layouts, `propose` deals layers out over a pipeline. `relate`, `Plan` and `assemble` are the parts
for whoever holds the tensors in memory.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mm_convert.errors import (
    CheckpointError,
    ConvertError,
    LayoutError,
    ModelError,
    OutputAccessError,
    OutputExistsError,
    OutputSpaceError,
    RamCapError,
    TotalityError,
)
from mm_convert.families import CONVERTERS, Family
from mm_convert.families.family import ModelSizes, Spelling
from mm_convert.layout import GivenLayout, Layout
from mm_convert.plans import Plan, Ref, Segment, Spec
from mm_convert.relate import relate

if TYPE_CHECKING:
    from mm_convert.balance import Proposal, propose
    from mm_convert.convert import Conversion, Converter, RunOptions
    from mm_convert.dry_run import Forecast, forecast
    from mm_convert.huggingface import HuggingFaceFolder
    from mm_convert.in_memory import assemble, huggingface_reader, megatron_reader
    from mm_convert.inspection import Inspection, inspect
    from mm_convert.megatron import MegatronFolder
    from mm_convert.planning import execute, plan
    from mm_convert.same_model import Comparison, Difference, verify

__all__ = [
    "plan",
    "execute",
    "Converter",
    "Layout",
    "GivenLayout",
    "Conversion",
    "RunOptions",
    "forecast",
    "Forecast",
    "inspect",
    "Inspection",
    "verify",
    "Comparison",
    "Difference",
    "propose",
    "Proposal",
    "HuggingFaceFolder",
    "MegatronFolder",
    "Plan",
    "Ref",
    "Spec",
    "Segment",
    "relate",
    "assemble",
    "huggingface_reader",
    "megatron_reader",
    "Family",
    "ModelSizes",
    "Spelling",
    "CONVERTERS",
    "ConvertError",
    "ModelError",
    "LayoutError",
    "CheckpointError",
    "TotalityError",
    "OutputExistsError",
    "OutputAccessError",
    "OutputSpaceError",
    "RamCapError",
]  # fmt: skip

# What the command line's help can do without, and where it is.
_LATER = {
    "plan": "planning",
    "execute": "planning",
    "Converter": "convert",
    "Conversion": "convert",
    "RunOptions": "convert",
    "forecast": "dry_run",
    "Forecast": "dry_run",
    "inspect": "inspection",
    "Inspection": "inspection",
    "verify": "same_model",
    "Comparison": "same_model",
    "Difference": "same_model",
    "propose": "balance",
    "Proposal": "balance",
    "HuggingFaceFolder": "huggingface",
    "MegatronFolder": "megatron",
    "assemble": "in_memory",
    "huggingface_reader": "in_memory",
    "megatron_reader": "in_memory",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"mm_convert.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
