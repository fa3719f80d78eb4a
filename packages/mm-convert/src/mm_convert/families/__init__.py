"""One file a model family, and the table that names them.

A new model is a file with a :class:`Family` in it, and one line in `CONVERTERS`.
"""

from __future__ import annotations

from mm_convert.errors import ModelError
from mm_convert.families.family import Family
from mm_convert.families.qwen2_5_vl import QWEN2_5_VL
from mm_convert.families.qwen2_vl import QWEN2_VL
from mm_convert.families.qwen3_vl import QWEN3_VL
from mm_convert.families.qwen_text import QWEN2_5, QWEN3

CONVERTERS = {
    "Qwen2_5_VLConverter": QWEN2_5_VL,
    "Qwen2VLConverter": QWEN2_VL,
    "Qwen3VLMegatronConverter": QWEN3_VL,
    # Text models have no published converter; these names are ours.
    "Qwen2_5Converter": QWEN2_5,
    "Qwen3Converter": QWEN3,
}

__all__ = ["CONVERTERS", "Family", "family"]


def family(converter: str) -> Family:
    """The family of a converter's published name.

    Raises:
        ModelError: no such converter.
    """
    if converter not in CONVERTERS:
        raise ModelError(f"no converter {converter!r}; there are: {', '.join(CONVERTERS)}")
    return CONVERTERS[converter]
