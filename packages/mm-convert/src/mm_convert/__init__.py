"""Hugging Face checkpoints to the Megatron-style layout of MindSpeed MM and back.

    >>> from mm_convert import Converter, Layout
    >>> layout = Layout(llm_pp_layers=[[12, 16]], vit_pp_layers=[[32, 0]], tp_size=1)
    >>> Converter.named("Qwen2_5_VLConverter").hf_to_mm("Qwen2.5-VL-7B-Instruct", "mm", layout)

A conversion is planned from headers, proved to use every byte and to make every byte once, and only
then carried out. `Converter` does it for folders; `relate`, `Plan` and `assemble` are the parts for
whoever holds the tensors in memory.
"""

from mm_convert.convert import Converter
from mm_convert.errors import (
    CheckpointError,
    ConvertError,
    LayoutError,
    ModelError,
    OutputExistsError,
    TotalityError,
)
from mm_convert.execute import assemble, huggingface_reader, megatron_reader
from mm_convert.families import CONVERTERS, Family
from mm_convert.families.family import ModelSizes
from mm_convert.huggingface import HuggingFaceFolder
from mm_convert.layout import Layout
from mm_convert.megatron import MegatronFolder
from mm_convert.plan import Plan, Ref, Segment, Spec
from mm_convert.relate import relate

__all__ = [
    "Converter",
    "Layout",
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
    "CONVERTERS",
    "ConvertError",
    "ModelError",
    "LayoutError",
    "CheckpointError",
    "TotalityError",
    "OutputExistsError",
]  # fmt: skip
