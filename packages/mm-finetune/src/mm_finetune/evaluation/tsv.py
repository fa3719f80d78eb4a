"""TSV files of VLMEvalKit, as they are: AI2D, ChartQA, DocVQA, MMMU and others of their shape.

A row is a question. Columns (VLMEvalKit, ``docs/en/Development.md``): ``index``; ``image``: a picture in base64, or up
to 64 characters that are the index of another row, which has it; or ``image_path``; ``question``; ``hint``; options in
``A``, ``B``, …; ``answer``; ``category``, ``l2-category``, ``split``. Several pictures or answers are a list as Python
writes it. An empty cell is an absent one.

The prompt is VLMEvalKit's own (``ImageMCQDataset`` and ``ImageVQADataset``): the pictures first, or where the text says
``<image 1>``, then with options ::

    Hint: {hint}
    Question: {question}
    Options:
    A. {A}
    B. {B}
    Please select the correct answer from the options above.

and without ::

    {question}
    Answer the question using a single word or phrase.

A question without options in a file with options (MMMU's open ones) keeps the first form and ends after the question.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from mm_datafmt import Message
from mm_finetune.errors import DataError
from mm_finetune.evaluation.answers import Failure
from mm_finetune.evaluation.metrics import Metric
from mm_finetune.evaluation.questions import Picture, PictureFile, Question
from mm_finetune.images import opened, read_rgb
from mm_finetune.template import IMAGE

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_REFERENCE = 64  # characters; VLMEvalKit tells an index from a picture by it
LONGEST_CELL = 2**31 - 1  # the csv module's own limit is 128 KiB
HEADER_BYTES = 1 << 16
SELECT = "Please select the correct answer from the options above."
BE_SHORT = "\nAnswer the question using a single word or phrase."
GROUPS = ("split", "category", "l2-category")
NAMED: Mapping[str, Metric] = {"chartqa": "relaxed", "docvqa": "anls", "infovqa": "anls"}
CHART_SPLITS = ("human", "augmented")

Row = Mapping[str, str]


def is_tsv(path: Path) -> bool:
    """Whether a file begins with the header of such a table.

    Raises:
        DataError: it can't be read.
    """
    try:
        with path.open("rb") as stream:
            first = stream.readline(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    return {b"index", b"question"} <= set(first.strip().removeprefix(b"\xef\xbb\xbf").split(b"\t"))


class Tsv:
    """A table, read row by row; of each row only the place in the file is kept.

    Args:
        path: the file.
        root: the folder that ``image_path`` is relative to.
        metric: how answers are judged; None: by what the table is. Options: ``choice``. ChartQA, known by the file's
            name or by splits "human" and "augmented": ``relaxed``. DocVQA and InfoVQA, known by the name, and answers
            that are lists: ``anls``. Else ``exact``.

    Raises:
        DataError: it is no such table.
    """

    usual_tokens = 128

    def __init__(self, path: Path, root: Path, metric: Metric | None) -> None:
        self.path, self.root = path, root
        self.columns: list[str] = next(iter(self._read(0)))[1]
        # By index, where the row begins: a picture may stand in another row, before or behind.
        self._places: dict[str, int] = {}
        found: set[tuple[Metric, str]] = set()
        for place, row in self._rows():
            self._places.setdefault(row.get("index", ""), place)
            found.add(self._judged(row))
        if not self._places:
            raise DataError(f"{path} holds no question")
        self._choice = any(kind == "choice" for kind, _ in found)
        likely = min(found, key=lambda item: (item[0] != "choice", item))
        self.metric, self.why = (metric, "asked for") if metric else likely

    def __iter__(self) -> Iterator[Question | Failure]:
        """The questions."""
        for number, (place, row) in enumerate(self._rows(), 1):
            try:
                yield self._question(number, place, row)
            except DataError as error:
                yield Failure(number=number, reason=str(error))

    def pictures_at(self, place: int) -> list[bytes]:
        """The pictures in the row that begins at a byte of the file.

        Raises:
            DataError: there are none, or not in base64.
        """
        cell = self._row_at(place).get("image", "")
        if len(cell) <= LONGEST_REFERENCE:
            raise DataError(f"its column image holds {cell!r}, which is no picture")
        try:
            return [base64.b64decode(one.rpartition("base64,")[2]) for one in listed(cell)]
        except binascii.Error as error:
            raise DataError(f"a picture is not in base64: {error}") from error

    def _question(self, number: int, place: int, row: Row) -> Question:
        answers = tuple(listed(row.get("answer", "")))
        if not answers:
            raise DataError("it has no answer: a test set whose answers are kept back can't be judged")
        options = options_of(row)
        if options and not set(answers) <= options.keys():
            raise DataError(f"the answer {answers[0]!r} is none of the options {', '.join(options)}")
        pictures, text = placed(self._prompt(row, options), self._pictures(place, row))
        first = pictures[0] if pictures else None
        return Question(
            number=number,
            messages=(Message("user", text),),
            answers=answers,
            pictures=tuple(pictures),
            image=_relative(first.path, self.root) if isinstance(first, PictureFile) else None,
            shown=row.get("question", ""),
            options=options,
            groups=tuple(dict.fromkeys(row[name] for name in GROUPS if row.get(name))),
        )

    def _prompt(self, row: Row, options: Mapping[str, str]) -> str:
        question = row.get("question", "")
        if not self._choice:
            return question + BE_SHORT
        lines = [f"Hint: {row['hint']}"] if row.get("hint") else []
        lines.append(f"Question: {question}")
        if options:
            lines += ["Options:", *(f"{letter}. {text}" for letter, text in options.items()), SELECT]
        return "\n".join(lines)

    def _pictures(self, place: int, row: Row) -> list[Picture]:
        cell = row.get("image", "")
        if cell and len(cell) <= LONGEST_REFERENCE and not cell.startswith("["):
            if cell not in self._places:
                raise DataError(f"its picture is that of row {cell!r}, which is not there")
            place = self._places[cell]
            cell = self._row_at(place).get("image", "")
        if cell:
            count = len(listed(cell))
            return [PictureCell(self, place, number, row.get("index", "")) for number in range(count)]
        paths = [self.root / name for name in listed(row.get("image_path", ""))]
        missing = [path for path in paths if not path.is_file()]
        if missing or not paths:
            raise DataError(f"{missing[0]} is missing; is --dataset_dir right?" if missing else "it has no picture")
        return [PictureFile(path) for path in paths]

    def _judged(self, row: Row) -> tuple[Metric, str]:
        if options_of(row):
            return "choice", "the table has options"
        for name, metric in NAMED.items():
            if name in self.path.name.lower():
                return metric, f"the file is called {self.path.name}"
        if any(word in row.get("split", "") for word in CHART_SPLITS):
            return "relaxed", "its splits are ChartQA's"
        if row.get("answer", "").startswith("["):
            return "anls", "its answers are lists, as DocVQA's"
        return "exact", "one right answer each"

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """Where each row begins, and its cells by column; the header is left out."""
        rows = self._read(0)
        next(rows)
        for place, cells in rows:
            yield place, dict(zip(self.columns, cells, strict=False))

    def _row_at(self, place: int) -> Row:
        return dict(zip(self.columns, next(self._read(place))[1], strict=False))

    def _read(self, start: int) -> Iterator[tuple[int, list[str]]]:
        at = start
        with self.path.open("rb") as stream:
            stream.seek(start)

            def lines() -> Iterator[str]:
                nonlocal at
                for line in stream:
                    at += len(line)
                    yield line.decode("utf-8", errors="replace").removeprefix("\ufeff")

            reader = csv.reader(lines(), delimiter="\t")
            while True:
                begin = at
                row = _next(reader, self.path, begin)
                if row is None:
                    return
                if row:
                    yield begin, row


@dataclass(frozen=True)
class PictureCell:
    """A picture in base64 in a table: that with a number in the row at a place."""

    table: Tsv
    place: int
    number: int
    index: str

    @property
    def name(self) -> str:
        """The table and the row that asks for it."""
        return f"{self.table.path}, index {self.index}"

    def size(self) -> tuple[int, int]:
        """From the header."""
        with opened(Path(self.name), self._content()) as picture:
            found: tuple[int, int] = picture.size
            return found

    def read(self) -> Image:
        """The whole picture."""
        return read_rgb(Path(self.name), self._content())

    def _content(self) -> bytes:
        return self.table.pictures_at(self.place)[self.number]


def options_of(row: Row) -> dict[str, str]:
    """The options of a row, by letter."""
    letters = (column for column in row if len(column) == 1 and column.isupper())
    return {letter: row[letter] for letter in sorted(letters) if row[letter]}


def listed(cell: str) -> list[str]:
    """The texts of a cell: a list as Python writes it, or one text; none of an empty cell."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            value = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [cell]
        if isinstance(value, list) and value:
            return [str(item) for item in value]
    return [cell] if cell else []


def placed(text: str, pictures: Sequence[Picture]) -> tuple[list[Picture], str]:
    """Pictures where the text says ``<image 1>``, as often as it says so; else all of them before the text.

    Raises:
        DataError: the text names a picture that is not there.
    """
    numbers = [int(number) for number in re.findall(r"<image (\d+)>", text)]
    if not numbers:
        return list(pictures), IMAGE * len(pictures) + text
    if not all(1 <= number <= len(pictures) for number in numbers):
        raise DataError(f"the text names picture {max(numbers)}, the row has {len(pictures)}")
    return [pictures[number - 1] for number in numbers], re.sub(r"<image \d+>", IMAGE, text)


def _next(reader: Any, path: Path, place: int) -> list[str] | None:
    """The next row; the csv module's limit, which holds for the whole process, is raised meanwhile."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        row: list[str] | None = next(reader, None)
        return row
    except csv.Error as error:
        raise DataError(f"{path} can't be read behind byte {place}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(PurePath(path))
