"""One file a model family, and the table that names them.

A new model is a file with a :class:`Family` in it, and one line in `CONVERTERS`.
"""

from __future__ import annotations

from mm_convert.errors import ModelError
from mm_convert.families.family import Family
from mm_convert.families.qwen2_5_vl import QWEN2_5_VL

CONVERTERS = {"Qwen2_5_VLConverter": QWEN2_5_VL}

__all__ = ["CONVERTERS", "Family", "family"]


def family(converter: str) -> Family:
    """The family of a converter's published name.

    Raises:
        ModelError: no such converter.
    """
    if converter not in CONVERTERS:
        raise ModelError(f"no converter {converter!r}; there are: {', '.join(CONVERTERS)}")
    return CONVERTERS[converter]
