"""How boxes are written in texts.

========== ==================================================== ========================================
name       a box                                                coordinates
========== ==================================================== ========================================
pixels     ``"bbox_2d": [x1, y1, x2, y2]`` (Qwen2.5-VL)         whole pixels of the picture's file
resized    the same                                             whole pixels of the picture the model sees
qwen2_vl   ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``          thousandths of the width and height
coco       ``"bbox": [x, y, width, height]``                    pixels of the picture's file, 2 decimals
========== ==================================================== ========================================

In JSON a box is a field of an object, and so is its ``label``; Qwen2-VL writes ``<|object_ref_start|>label
<|object_ref_end|>`` before it. Where a picture is turned by its EXIF orientation, width and height are as stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_BLANK = r"[ \t\r\n]*"
_STRING = r'"(?:[^"\\]|\\.)*"'
_LABEL = r"[^<]*(?:<(?!\|object_ref_)[^<]*)*"
_PAIR = rf"\(({NUMBER.pattern}),({NUMBER.pattern})\)"


@dataclass(frozen=True, kw_only=True)
class Notation:
    """One row of the table above.

    ``key`` is the field in JSON, empty for Qwen2-VL's marks. ``space`` says what coordinates count: ``file``, ``seen``
    (the resized picture) or ``thousandths``. ``steps`` are the smallest steps in a unit; ``corner_and_size`` says that
    the last two numbers are width and height.
    """

    name: str
    key: str
    space: str
    steps: int = 1
    corner_and_size: bool = False

    @property
    def sign(self) -> str:
        """The text that every box of this notation holds."""
        return f'"{self.key}"' if self.key else "<|box_start|>"


NOTATIONS: Mapping[str, Notation] = MappingProxyType(
    {
        notation.name: notation
        for notation in (
            Notation(name="pixels", key="bbox_2d", space="file"),
            Notation(name="resized", key="bbox_2d", space="seen"),
            Notation(name="qwen2_vl", key="", space="thousandths"),
            Notation(name="coco", key="bbox", space="file", steps=100, corner_and_size=True),
        )
    }
)

MARKED = re.compile(
    rf"(?:<\|object_ref_start\|>({_LABEL})<\|object_ref_end\|>)?<\|box_start\|>{_PAIR},{_PAIR}<\|box_end\|>"
)
"""A box of Qwen2-VL: label or None, four numbers."""


def field_pattern(key: str) -> re.Pattern[str]:
    """Return what finds ``"key": [four numbers]``; group 1 is the list."""
    numbers = rf"{_BLANK},{_BLANK}".join([NUMBER.pattern] * 4)
    return re.compile(rf'"{key}"{_BLANK}:{_BLANK}(\[{_BLANK}{numbers}{_BLANK}\])')


def begun_pattern(notation: Notation) -> re.Pattern[str]:
    """Return what finds the beginning of a box, whole or not."""
    return re.compile(rf'"{notation.key}"{_BLANK}:' if notation.key else re.escape(notation.sign))


def object_pattern(key: str) -> re.Pattern[str]:
    """Return what finds an object of a box and perhaps a label alone; groups: label, list, list, label."""
    box, label = field_pattern(key).pattern, rf'"label"{_BLANK}:{_BLANK}({_STRING})'
    comma = rf"{_BLANK},{_BLANK}"
    return re.compile(rf"\{{{_BLANK}(?:{label}{comma}{box}|{box}(?:{comma}{label})?){_BLANK}\}}")
