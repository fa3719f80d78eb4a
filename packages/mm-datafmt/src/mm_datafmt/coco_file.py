"""A COCO annotation file, joined: the images' names are held in memory, the annotations as compactly as they can be.

About 45 bytes an object and 150 an image are needed, 60 MB for ``instances_train2017.json``; captions are not held.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

from .errors import ParseError, RecordError, shown
from .inputs import Input, skip_head
from .scanning import KEY, ValueScanner
from .splitting import RUN, Cursor, Run, array_runs
from .window import Window

_RECORDS = 256
_LARGEST_ID = 1 << 63  # what an array holds
_LARGEST_SIDE = 1e9  # pixels: no picture has such a side, and sums of two stay finite


def has_captions(source: Input) -> bool:
    """Return whether the first annotation of a COCO file is a caption."""
    for run in _section_runs(source, "annotations"):
        return any(isinstance(value, dict) and "caption" in value for value in run.values)
    return False


def coco_runs(source: Input, start: Cursor, on_bytes: Callable[[int], object] | None = None) -> Iterator[Run]:
    """Yield joined records from number ``start.number`` on; line and byte of a record are its number.

    A record is ``{"id", "file_name", "caption"}``, one for each caption, or ``{"id", "file_name", "width", "height",
    "objects": [[name, [x, y, width, height]], …]}``, one for each image that has objects (crowds are no objects).
    """
    names: dict[int, Any] = {}
    for run in _section_runs(source, "images", on_bytes):
        for image in run.values:
            _take_image(source, image, names)
    joined = _captions(source, names) if source.joined == "captions" else _objects(source, names)
    number, kept = 1, list[object]()
    for record in joined:
        if number >= start.number:
            kept.append(record)
        number += 1
        if len(kept) == _RECORDS:
            yield _run(number, kept)
            kept = []
    if kept:
        yield _run(number, kept)


def _run(end: int, values: list[object]) -> Run:
    begin = end - len(values)
    return Run(Cursor(begin, begin, begin), values, b"", "rows", Cursor(end, end, end))


def _take_image(source: Input, image: Any, names: dict[int, Any]) -> None:
    match image:
        case {"id": int(number), "file_name": str(name)}:
            names[number] = (name, image.get("width"), image.get("height"))
        case _:
            raise ParseError(f"{source.path}: an image without 'id' and 'file_name', or not JSON: {shown(image, 200)}")


def _captions(source: Input, names: dict[int, Any]) -> Iterator[object]:
    for run in _section_runs(source, "annotations"):
        for value in run.values:
            match value:
                case {"image_id": int(image), "caption": str(caption), "id": int(number)} if image in names:
                    yield {"id": number, "file_name": names[image][0], "caption": caption}
                case _:
                    yield _bad(value)


def _objects(source: Input, names: dict[int, Any]) -> Iterator[object]:
    categories: dict[int, str] = {}
    for run in _section_runs(source, "categories"):
        for value in run.values:
            match value:
                case {"id": int(number), "name": str(name)} if abs(number) < _LARGEST_ID:
                    categories[number] = name
                case _:
                    raise ParseError(
                        f"{source.path}: a category without 'id' and 'name', or not JSON: {shown(value, 200)}"
                    )
    kinds, boxes, following = array("q"), array("d"), array("q")
    last: dict[int, int] = {}
    bad = []
    annotations: Iterator[Any] = (value for run in _section_runs(source, "annotations") for value in run.values)
    for value in annotations:
        match value:
            case {"image_id": int(image), "category_id": int(kind), "bbox": [x, y, width, height]} if (
                image in names and kind in categories and _are_numbers(x, y, width, height)
            ):
                if not value.get("iscrowd"):
                    following.append(last.get(image, -1))
                    last[image] = len(kinds)
                    kinds.append(kind)
                    boxes.extend((x, y, width, height))
            case _:
                bad.append(_bad(value))
    for image, (name, width, height) in names.items():
        found, index = [], last.get(image, -1)
        while index >= 0:
            found.append([categories[kinds[index]], list(boxes[4 * index : 4 * index + 4])])
            index = following[index]
        if found:
            yield {"id": image, "file_name": name, "width": width, "height": height, "objects": found[::-1]}
    yield from bad


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, (int, float)) and abs(value) < _LARGEST_SIDE for value in values)


def _bad(value: object) -> RecordError:
    if isinstance(value, RecordError):
        return value
    return RecordError(f"an annotation that cannot be joined with an image and a category: {shown(value, 200)}")


def _section_runs(source: Input, section: str, on_bytes: Callable[[int], object] | None = None) -> Iterator[Run]:
    """Yield the runs of one array at the top of the file, passing over everything else."""
    with source.open(on_bytes) as window:
        skip_head(window)
        window.position += 1
        while True:
            window.available(RUN)
            match = KEY.match(window.buffer, window.position)
            if match is None:
                return
            window.position = match.end()
            if match[1].decode("utf-8", "replace") == section:
                window.skip_blank()
                if window.peek() != b"[":
                    raise ParseError(f"{source.path}: {section!r} at the top must be an array")
                window.position += 1
                yield from array_runs(window, Cursor(), max_record=source.max_record)
                return
            _skip_value(window)


def _skip_value(window: Window) -> None:
    scanner = ValueScanner(window.position)
    while (end := scanner.end_in(window.buffer)) < 0 and not window.ended:
        window.position = scanner.position
        before = window.base
        window.available(len(window.buffer) - window.position + 1)
        scanner.position -= window.base - before
    window.position = end if end >= 0 else len(window.buffer)
