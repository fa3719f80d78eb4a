"""Tables of models whose original release and diffusers give a layer different names, and fuse differently."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mm_convert.families.slices import joined
from mm_convert.families.table import Row, both
from mm_convert.rules import Stacked

Line = tuple[Callable[[str, str], list[Row]], str, str, str]
"""How a layer is divided; its name in the original release, in diffusers, and in MindSpeed MM."""


def rows(lines: Iterable[Line], *, original: bool) -> list[Row]:
    """The rows of one of the two name styles."""
    return [
        row
        for divided, in_original, in_diffusers, mm in lines
        for row in divided(in_original if original else in_diffusers, mm)
    ]


def qkv(hf: str, mm: str) -> list[Row]:
    """Query, key and value, of one fused source or of three: rank t holds ``[q_t; k_t; v_t]``."""
    return both(hf, mm, joined(3, "each") if "," in hf else Stacked(3))
