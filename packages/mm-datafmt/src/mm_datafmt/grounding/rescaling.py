"""Boxes from one notation and size of picture to another; everything around them stays, byte for byte."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..checking.headers import Header
from ..errors import FormatError, RecordError, shown
from ..pictures import PIXEL_CAP
from ..sample import Message, Sample
from ..tokens import resized_size
from .notations import MARKED, NOTATIONS, NUMBER, Notation, begun_pattern, field_pattern, object_pattern

Size = tuple[int, int]
SLACK = 0.5
"""Units that a box may stick out before it is refused: half a pixel comes from rounding, and is cut off."""

_ROLES = ("user", "assistant")
_OTHER_MARKS = ("<|object_ref_", "<|box_")


@dataclass(frozen=True)
class BoxConversion:
    """From notation ``source`` to ``target``, names of :data:`NOTATIONS`; the same twice only checks the boxes.

    ``pixel_cap`` is the trainer's ``image_max_pixels``, on which the size of the resized picture depends (None: that of
    the processor alone).
    """

    source: str
    target: str
    pixel_cap: int | None = PIXEL_CAP

    def __post_init__(self) -> None:
        for name in (self.source, self.target):
            if name not in NOTATIONS:
                raise FormatError(f"unknown notation of boxes {shown(name)}; known are {', '.join(NOTATIONS)}")

    @classmethod
    def named(cls, text: str, pixel_cap: int | None = PIXEL_CAP) -> BoxConversion:
        """Return the conversion that ``FROM:TO`` names, or raise :class:`FormatError`."""
        source, _, target = text.partition(":")
        return cls(source, target, pixel_cap)

    def __call__(self, sample: Sample, size_of: Callable[[str], Header | RecordError]) -> Sample:
        """Return ``sample`` with its boxes converted; ``size_of`` gives the header of a picture by its path.

        Pictures are looked at only if there is a box. Raises :class:`RecordError` as :func:`rescale_boxes` does, and
        the fault of a picture that has one.
        """
        if not any(notation.sign in turn.content for turn in sample.messages for notation in NOTATIONS.values()):
            return sample
        sizes = []
        for path in sample.images:
            header = size_of(path)
            if isinstance(header, RecordError):
                raise header
            sizes.append((header.width, header.height))
        return self.rescaled(sample, sizes)

    def rescaled(self, sample: Sample, sizes: Sequence[Size]) -> Sample:
        """Return ``sample`` with its boxes converted, given the sizes of its pictures' files."""
        turns = tuple(
            self._turn(turn, number, sizes) if turn.role in _ROLES else turn
            for number, turn in enumerate(sample.messages, 1)
        )
        return sample._replace(messages=turns)

    def _turn(self, turn: Message, number: int, sizes: Sequence[Size]) -> Message:
        try:
            content = self._text(turn.content, sizes)
            if turn.role == "assistant":
                self._require_whole(turn.content)
        except RecordError as fault:
            raise RecordError(f"turn {number}: {fault}", code=fault.code) from None
        return turn if self.source == self.target else turn._replace(content=content)

    @cached_property
    def _ends(self) -> tuple[Notation, Notation]:
        return NOTATIONS[self.source], NOTATIONS[self.target]

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """What finds the boxes of the source, and what of them can be carried over."""
        source, target = self._ends
        if not source.key:
            return MARKED, MARKED
        return field_pattern(source.key), (field_pattern if target.key else object_pattern)(source.key)

    def _require_whole(self, text: str) -> None:
        """Raise if an answer holds a box that was not understood."""
        source, _ = self._ends
        begun = len(begun_pattern(source).findall(text))
        whole = len(self._patterns[0].findall(text))
        if begun > whole:
            raise RecordError(f"{begun - whole} of {begun} {source.sign} are no box of four numbers", code="box_syntax")
        if not whole:
            for other in NOTATIONS.values():
                if other.sign != source.sign and begun_pattern(other).search(text):
                    raise RecordError(f"boxes are written as {other.sign}, not as {source.name}", code="box_notation")

    def _text(self, text: str, sizes: Sequence[Size]) -> str:
        found, carried = self._patterns
        count = len(found.findall(text))
        if not count:
            return text
        frame = self._frame(sizes)
        if len(carried.findall(text)) < count:
            raise RecordError(
                "an object has more fields than its box and its label, for which qwen2_vl has no place",
                code="not_carried",
            )
        return carried.sub(lambda match: self._written(match, frame), text)

    def _frame(self, sizes: Sequence[Size]) -> dict[str, Size]:
        """Return the extent of each space for the picture that boxes belong to."""
        if len(set(sizes)) != 1:
            raise RecordError(
                f"boxes, and {len(sizes)} pictures of {len(set(sizes))} sizes: whose boxes are they?",
                code="box_picture",
            )
        size = sizes[0]
        frame = {"file": size, "thousandths": (1000, 1000)}
        if "resized" in (self.source, self.target):
            try:
                frame["seen"] = resized_size(*size, pixel_cap=self.pixel_cap)
            except ValueError as error:
                raise RecordError(str(error), code="bad_image") from None
        return frame

    def _written(self, match: re.Match[str], frame: dict[str, Size]) -> str:
        source, target = self._ends
        if not source.key:
            numbers, label = [float(text) for text in match.groups()[1:]], match[1]
        else:
            *_, listed = (group for group in match.groups() if group and group.startswith("["))
            numbers = [float(text) for text in NUMBER.findall(listed)]
            quoted = next((group for group in match.groups() if group and group.startswith('"')), None)
            label = None if quoted is None or target.key else _label(quoted)
        box = _converted(numbers, source, target, frame)
        if not target.key:
            ref = "" if label is None else f"<|object_ref_start|>{label}<|object_ref_end|>"
            return f"{ref}<|box_start|>({box[0]},{box[1]}),({box[2]},{box[3]})<|box_end|>"
        if source.key:
            values = iter(box)
            listed = NUMBER.sub(lambda _: next(values), match[1])
            return f'"{target.key}"{match[0][len(source.key) + 2 : -len(match[1])]}{listed}'
        named = "" if label is None else f', "label": {json.dumps(label, ensure_ascii=False)}'
        return f'{{"{target.key}": [{", ".join(box)}]{named}}}'


def rescale_boxes(
    sample: Sample, sizes: Sequence[Size], *, source: str, target: str, pixel_cap: int | None = PIXEL_CAP
) -> Sample:
    """Return ``sample`` with the boxes in its questions and answers converted from ``source`` to ``target``.

    Both are names of :data:`NOTATIONS`; ``sizes`` are width and height of its pictures' files. A coordinate is off by
    half a step of the target at most (half a pixel or thousandth; for ``coco`` 0.005 pixel, for its width and height
    0.01); a side that would vanish is rounded outwards, by less than a step. Converted back, a whole number is itself
    again where a step of the target is smaller than one of the source, and else off by half the target's step, rounded
    up to half a step.

    Raises :class:`FormatError` for a notation that does not exist, and :class:`RecordError` with a code: ``box_range``
    (outside the picture), ``box_degenerate`` (no width or height, corners exchanged), ``box_picture`` (no picture, or
    several of different sizes), ``box_syntax`` (an answer has a box without four numbers), ``box_notation`` (an
    answer's boxes are written in another way), ``not_carried`` (a field or a label that Qwen2-VL has no place for).
    """
    return BoxConversion(source, target, pixel_cap).rescaled(sample, sizes)


def _label(quoted: str) -> str:
    try:
        label: str = json.loads(quoted)
        label.encode()
    except ValueError:
        raise RecordError(f"the label {shown(quoted)} is no text", code="box_syntax") from None
    if any(mark in label for mark in _OTHER_MARKS):
        raise RecordError(f"the label {shown(label)} holds a mark of Qwen2-VL", code="not_carried")
    return label


def _converted(numbers: Sequence[float], source: Notation, target: Notation, frame: dict[str, Size]) -> list[str]:
    x1, y1, x2, y2 = numbers
    if source.corner_and_size:
        x2, y2 = x1 + x2, y1 + y2
    sides = []
    for axis, (low, high) in enumerate(((x1, x2), (y1, y2))):
        given, wanted = frame[source.space][axis], frame[target.space][axis]
        _require_inside(numbers, low, high, given, frame["file"])
        sides.append(_fitted(low * wanted / given, high * wanted / given, wanted, target.steps))
    (left, right), (top, bottom) = sides
    if target.corner_and_size:
        right, bottom = right - left, bottom - top
    return [_decimal(steps, target.steps) for steps in (left, top, right, bottom)]


def _require_inside(numbers: Sequence[float], low: float, high: float, extent: int, size: Size) -> None:
    box = ", ".join(f"{number:g}" for number in numbers)
    if not low < high:
        raise RecordError(f"the box [{box}] has no width or no height", code="box_degenerate")
    if low < -SLACK or high > extent + SLACK or low >= extent or high <= 0:
        raise RecordError(
            f"the box [{box}] is not inside the picture of {size[0]}x{size[1]} (it may reach to {extent})",
            code="box_range",
        )


def _fitted(low: float, high: float, extent: int, steps: int) -> tuple[int, int]:
    """Return two ends in whole steps inside the extent, the second behind the first."""
    first, second = round(low * steps), round(high * steps)
    if first == second:
        first, second = math.floor(low * steps), math.ceil(high * steps)
    return max(0, first), min(extent * steps, second)


def _decimal(value: int, steps: int) -> str:
    whole, rest = divmod(value, steps)
    return str(whole) if not rest else f"{value / steps:.2f}".rstrip("0")
