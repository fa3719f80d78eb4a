"""Questions and answers made of COCO annotations. Read only.

A COCO file is no list of records: images and annotations are joined by number first, in :mod:`mm_datafmt.coco_file`.
What these classes parse is one joined record: a caption with its image, or an image with its objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import orjson

from ..errors import FormatError
from ..sample import Message, Sample
from .base import Format, object_of

QUESTIONS: Mapping[str, Sequence[str]] = {
    "coco_captions": (
        "Describe the picture in one sentence.",
        "What does the picture show?",
        "Write a short caption for this picture.",
        "What can be seen here?",
    ),
    "coco_classes": ("Which kinds of objects are in the picture? Name them, separated by commas.",),
    "coco_counts": ("Which objects are in the picture, and how many of each?",),
    "coco_boxes": (
        "Locate every object in the picture. Answer in JSON: a list of objects with the keys bbox_2d and label.",
    ),
}
"""What is asked, by format; where there are several, the number of the annotation picks one."""


class Coco(Format):
    """One kind of question about a COCO file; ``joined`` tells the reader of such files what to join."""

    signs = "'annotations' and 'images' at the top of one JSON object"
    joined: ClassVar[str] = "objects"

    def detects(self, record: Mapping[str, object]) -> int:
        """No single record does: files are recognised by their first bytes."""
        return 0

    def parse(self, record: object) -> Sample:
        """Return the question and its answer."""
        fields: Any = object_of(record)
        questions = QUESTIONS[self.name]
        question = f"<image>\n{questions[fields['id'] % len(questions)]}"
        messages = (Message("user", question), Message("assistant", self.answer(fields)))
        return Sample(messages, (fields["file_name"],))

    def answer(self, fields: Mapping[str, Any]) -> str:
        """Return the answer that the annotations give."""
        raise NotImplementedError

    def emit(self, sample: Sample) -> dict[str, object]:
        """Annotations cannot be made of answers."""
        raise FormatError(f"{self.name} can only be read")


class CocoCaptions(Coco):
    """``captions_*.json``: one sample a caption."""

    name = "coco_captions"
    joined = "captions"

    def answer(self, fields: Mapping[str, Any]) -> str:
        """Return the caption, without the white space around it."""
        caption: str = fields["caption"]
        return caption.strip()


class CocoClasses(Coco):
    """``instances_*.json``: the names of the kinds of objects, in alphabetical order."""

    name = "coco_classes"

    def answer(self, fields: Mapping[str, Any]) -> str:
        """Return the names, separated by commas."""
        return ", ".join(sorted({label for label, _ in fields["objects"]}))


class CocoCounts(Coco):
    """``instances_*.json``: how many of each kind, the most frequent first."""

    name = "coco_counts"

    def answer(self, fields: Mapping[str, Any]) -> str:
        """Return ``name: number`` pairs, separated by commas."""
        counts = Counter(label for label, _ in fields["objects"])
        return ", ".join(f"{label}: {n}" for label, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


class CocoBoxes(Coco):
    """``instances_*.json``: boxes in the manner of Qwen2.5-VL, whole pixels of the original picture, two corners."""

    name = "coco_boxes"

    def answer(self, fields: Mapping[str, Any]) -> str:
        """Return a JSON list of ``{"bbox_2d": [x1, y1, x2, y2], "label"}``; COCO's boxes are corner, width, height."""
        boxes = [
            {"bbox_2d": [round(x), round(y), round(x + width), round(y + height)], "label": label}
            for label, (x, y, width, height) in fields["objects"]
        ]
        return orjson.dumps(boxes).decode()


COCO_FORMATS: Sequence[Coco] = (CocoCaptions(), CocoBoxes(), CocoClasses(), CocoCounts())
