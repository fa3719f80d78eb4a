"""What is asked: the records of a data set as questions, whatever kind of file they stand in.

::

    questions = open_questions(Path("heldout.json"))       # or a TSV file of VLMEvalKit
    questions.metric                                       # how answers to them are judged, and questions.why
    for question in questions: ...                         # in constant memory; a bad record is a Failure
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from mm_datafmt import Message
from mm_finetune.evaluation.answers import Failure
from mm_finetune.evaluation.metrics import Metric
from mm_finetune.images import opened, read_rgb
from mm_finetune.template import IMAGE, VIDEO

if TYPE_CHECKING:
    from PIL.Image import Image


class Picture(Protocol):
    """A picture that is read when it is needed; both methods raise :class:`~mm_finetune.errors.DataError`."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def size(self) -> tuple[int, int]:
        """Width and height, from the header."""

    def read(self) -> Image:
        """Its pixels, as RGB."""


@dataclass(frozen=True)
class PictureFile:
    """A picture in a file of its own."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def size(self) -> tuple[int, int]:
        """From the header."""
        with opened(self.path) as picture:
            found: tuple[int, int] = picture.size
            return found

    def read(self) -> Image:
        """The whole file."""
        return read_rgb(self.path)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One record.

    Attributes:
        number: of the record, from 1.
        messages: the conversation up to the question, which is its last turn; an ``<image>`` where a picture stands.
        answers: all right answers, at least one unless nobody knows it; with options their letters.
        pictures: in the order of their places.
        videos: likewise.
        image: the first picture's path relative to the dataset folder, None without one.
        shown: the question as reports show it.
        options: texts by letter, of a multiple-choice question.
        groups: what it is counted under; none: under `shown`.
    """

    number: int
    messages: tuple[Message, ...]
    answers: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    videos: tuple[Path, ...] = ()
    image: str | None = None
    shown: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()


class Questions(Protocol):
    """A data set. Every iteration gives the same questions in the same order."""

    @property
    def root(self) -> Path:
        """The folder that pictures are relative to."""

    @property
    def metric(self) -> Metric:
        """How answers are judged."""

    @property
    def usual_tokens(self) -> int:
        """The longest answer that is waited for, in tokens, unless told otherwise."""

    @property
    def why(self) -> str:
        """Why so, in a few words."""

    def __iter__(self) -> Iterator[Question | Failure]: ...


def open_questions(
    data: Path, *, dataset_dir: Path | None = None, metric: Literal["auto"] | Metric = "auto"
) -> Questions:
    """Open a data set; its first bytes tell what it is.

    Args:
        data: a TSV file of VLMEvalKit, see :mod:`.tsv`, or records of a format of mm-datafmt, see :mod:`.records`.
        dataset_dir: the folder that pictures are relative to; default: the folder of `data`.
        metric: how answers are judged; ``auto``: by what the data set is.

    Raises:
        DataError: it can't be read.
    """
    from mm_finetune.evaluation.records import Records
    from mm_finetune.evaluation.tsv import Tsv, is_tsv

    root = data.parent if dataset_dir is None else dataset_dir
    asked = None if metric == "auto" else metric
    return Tsv(data, root, asked) if is_tsv(data) else Records(data, root, asked)


def question_of(
    text: str, *, images: Sequence[Path] = (), videos: Sequence[Path] = (), system: str | None = None
) -> Question:
    """A question as a person asks it; pictures and videos come first, unless the text says where they stand.

    Args:
        text: the question.
        images: files of pictures.
        videos: files of videos.
        system: the system turn; default: that of training.
    """
    for mark, files in ((VIDEO, videos), (IMAGE, images)):
        if mark not in text:
            text = f"{mark}\n" * len(files) + text
    turns = (() if system is None else (Message("system", system),)) + (Message("user", text),)
    return Question(number=1, messages=turns, pictures=tuple(map(PictureFile, images)), videos=tuple(videos))
