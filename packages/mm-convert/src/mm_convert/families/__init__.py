"""One file a model family, and the table that names them.

A new model is a file with a :class:`Family` in it, and one line in `CONVERTERS`.
"""

from __future__ import annotations

from mm_convert.errors import ModelError
from mm_convert.families.cogvideox import COGVIDEOX
from mm_convert.families.family import Family
from mm_convert.families.hunyuan_video import HUNYUAN_VIDEO
from mm_convert.families.internvl import INTERNVL
from mm_convert.families.qwen2_5_omni import QWEN2_5_OMNI
from mm_convert.families.qwen2_5_vl import QWEN2_5_VL
from mm_convert.families.qwen2_vl import QWEN2_VL
from mm_convert.families.qwen3_vl import QWEN3_VL
from mm_convert.families.qwen_text import QWEN2_5, QWEN3
from mm_convert.families.wan import WAN

CONVERTERS = {
    "Qwen2_5_VLConverter": QWEN2_5_VL,
    "Qwen2VLConverter": QWEN2_VL,
    "Qwen3VLMegatronConverter": QWEN3_VL,
    "InternVLConverter": INTERNVL,
    "Qwen2_5_OmniConverter": QWEN2_5_OMNI,
    "WanConverter": WAN,
    "HunyuanVideoConverter": HUNYUAN_VIDEO,
    "CogVideoConverter": COGVIDEOX,
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
