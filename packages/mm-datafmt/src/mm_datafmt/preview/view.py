"""What a trainer makes of one record: pictures, pieces of text, tokens, loss, cut."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import OptionError, RecordError, shown
from ..formats import Format
from ..opening import OnFormat, opened
from ..pictures import PIXEL_CAP, PictureFolder, token_count
from ..rules import faults_of
from ..sample import Sample
from ..splitting import Run
from ..tokens import resized_size
from .template import IMAGE_PAD, Segment, segments
from .tokenizer import PreviewTokenizer
from .truncation import kept_lengths

_MARK = re.compile(r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """How the trainer is set.

    ``seq_length``: tokens at which it cuts (None: it does not). ``pixel_cap``: its ``image_max_pixels`` (None: no limit
    but the processor's). ``mask_history`` and ``train_on_prompt`` as in its ``basic_parameters``.
    """

    seq_length: int | None = None
    pixel_cap: int | None = PIXEL_CAP
    mask_history: bool = False
    train_on_prompt: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_length", "pixel_cap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PictureView:
    """One picture: its size, the size the model sees and the tokens that it becomes, or None with ``fault``."""

    path: str
    size: tuple[int, int] | None = None
    resized: tuple[int, int] | None = None
    tokens: int | None = None
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One piece of the text.

    ``loss`` says whether its tokens carry loss (``weight``: how much, if the record says so). Of the ``ids`` (None
    without a tokenizer) the first ``kept`` stay when the sequence is cut; they are the first ``kept_text`` characters.
    """

    role: str
    text: str
    loss: bool
    weight: float | None
    ids: tuple[int, ...] | None
    kept: int
    kept_text: int


@dataclass(frozen=True, kw_only=True)
class View:
    """One record: where it stands, what it becomes, and ``notes`` on what is wrong or not known."""

    record: int
    line: int | None
    pictures: tuple[PictureView, ...]
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int | None:
        """How many tokens there are before the cut, None without a tokenizer."""
        if not self.pieces or any(piece.ids is None for piece in self.pieces):
            return None
        return sum(len(piece.ids or ()) for piece in self.pieces)

    @property
    def kept(self) -> int:
        """How many tokens stay."""
        return sum(piece.kept for piece in self.pieces)

    @property
    def learnt(self) -> int:
        """How many of the tokens that stay carry loss."""
        return sum(piece.kept for piece in self.pieces if piece.loss)


class Viewer:
    """Turns samples into views; ``folder`` is what their paths are relative to."""

    def __init__(self, folder: Path, tokenizer: PreviewTokenizer | None, options: PreviewOptions) -> None:
        self._pictures = PictureFolder(folder)
        self._tokenizer = tokenizer
        self._options = options

    def view(self, sample: Sample, record: int, line: int | None = None) -> View:
        """Return the view of ``sample``, record number ``record`` of its file."""
        pictures = tuple(self._picture(path) for path in sample.images)
        faults = [str(fault) for fault in faults_of(sample)]
        if faults:
            pieces = tuple(_plain(role, content) for role, content, _, _ in sample.messages)
            return View(record=record, line=line, pictures=pictures, pieces=pieces, notes=tuple(faults))
        parts = segments(
            sample.messages,
            [picture.tokens or 1 for picture in pictures],
            mask_history=self._options.mask_history,
            train_on_prompt=self._options.train_on_prompt,
        )
        pieces = self._encoded(parts)
        notes = [*_unknown(sample, pictures), *_cut_pictures(pieces)]
        return View(record=record, line=line, pictures=pictures, pieces=pieces, notes=tuple(notes))

    def _picture(self, path: str) -> PictureView:
        header = self._pictures(path)
        if isinstance(header, RecordError):
            return PictureView(path=path, fault=str(header))
        size = header.width, header.height
        try:
            resized = resized_size(*size, pixel_cap=self._options.pixel_cap)
        except ValueError as error:
            return PictureView(path=path, size=size, fault=str(error))
        return PictureView(path=path, size=size, resized=resized, tokens=token_count(resized))

    def _encoded(self, parts: Sequence[Segment]) -> tuple[Piece, ...]:
        if self._tokenizer is None:
            return tuple(_plain(part.role, part.text, part.loss, part.weight) for part in parts)
        encoded = [self._tokenizer(part.text) for part in parts]
        lengths = [len(ids) for ids, _ in encoded]
        kept = lengths if self._options.seq_length is None else self._kept(parts, lengths, self._options.seq_length)
        return tuple(
            Piece(
                role=part.role,
                text=part.text,
                loss=part.loss,
                weight=part.weight,
                ids=tuple(ids),
                kept=count,
                kept_text=len(part.text) if count == len(ids) else ends[count - 1] if count else 0,
            )
            for part, (ids, ends), count in zip(parts, encoded, kept, strict=True)
        )

    def _kept(self, parts: Sequence[Segment], lengths: Sequence[int], seq_length: int) -> list[int]:
        """Return how many tokens of each piece stay; the answer is the last piece of its turn."""
        turns: list[list[int]] = [[] for _ in range(parts[-1].turn + 1)]
        for part, length in zip(parts, lengths, strict=True):
            turns[part.turn].append(length)
        pairs = [(sum(turn[:-1]), turn[-1]) for turn in turns]
        kept = []
        shares = kept_lengths(pairs, seq_length, last_first=self._options.mask_history)
        for turn, (source, target) in zip(turns, shares, strict=True):
            for length in turn[:-1]:
                kept.append(min(length, source))
                source -= kept[-1]
            kept.append(target)
        return kept


def preview(
    path: str | os.PathLike[str],
    *,
    n: int = 5,
    start: int = 1,
    tokenizer: PreviewTokenizer | None = None,
    options: PreviewOptions | None = None,
    dataset_dir: str | os.PathLike[str] | None = None,
    source_format: str | None = None,
    on_format: OnFormat | None = None,
) -> Iterator[View]:
    """Yield the views of ``n`` records of ``path`` from record ``start`` on (from 1); reading stops behind them.

    Pictures are looked for under ``dataset_dir`` (default: the folder of ``path``). A record that is no sample becomes
    a view with a note. Raises :class:`FormatError`, :class:`ParseError`, :class:`FolderError` and ``OSError``.
    """
    if n < 1 or start < 1:
        raise OptionError(f"n is {n} and start is {start}; both must be at least 1")
    file = Path(path)
    folder = file.parent if dataset_dir is None else Path(dataset_dir)
    viewer = Viewer(folder, tokenizer, options or PreviewOptions())
    source, fmt = opened(file, source_format, on_format)
    views = (view for run in source.runs() if run.end.number > start for view in _views(run, viewer, fmt, start))
    return islice(views, n)


def _views(run: Run, viewer: Viewer, fmt: Format, start: int) -> Iterator[View]:
    for place, value in zip(run.places(), run.values, strict=True):
        if place.number < start:
            continue
        try:
            if isinstance(value, RecordError):
                raise value
            sample = fmt.parse(value)
        except RecordError as fault:
            yield View(record=place.number, line=place.line, pictures=(), pieces=(), notes=(str(fault),))
        else:
            yield viewer.view(sample, place.number, place.line)


def _plain(role: str, text: str, loss: bool = False, weight: float | None = None) -> Piece:
    return Piece(role=role, text=text, loss=loss, weight=weight, ids=None, kept=0, kept_text=len(text))


def _unknown(sample: Sample, pictures: Sequence[PictureView]) -> Iterator[str]:
    """Say what makes the count of tokens or the text uncertain."""
    for number, picture in enumerate(pictures, 1):
        if picture.tokens is None:
            yield f"picture {number} is counted as one token: {picture.fault}"
    for kind, paths in (("video", sample.videos), ("audio", sample.audios)):
        if paths:
            yield f"{len(paths)} {kind} path(s): their tokens are not counted, that needs their content"
    if sample.tools is not None:
        yield "tools are not part of this template: the model does not see them"
    for number, (_, content, _, _) in enumerate(sample.messages, 1):
        if mark := _MARK.search(content):
            yield f"turn {number} itself holds {shown(mark[0])}: it becomes a token that ends or begins something"


def _cut_pictures(pieces: Sequence[Piece]) -> Iterator[str]:
    total = sum(piece.text.count(IMAGE_PAD) for piece in pieces)
    kept = sum(piece.text[: piece.kept_text].count(IMAGE_PAD) for piece in pieces)
    if kept < total:
        yield (
            f"the cut takes {total - kept} of {total} picture tokens while the pictures stay whole: training stops "
            "there; use fewer or smaller pictures, a longer --seq_length, or leave the record out"
        )
