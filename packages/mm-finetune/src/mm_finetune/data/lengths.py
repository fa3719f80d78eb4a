"""What every record of a data set costs, known before the first step without decoding a picture.

An index is a handful of arrays, so it is sent from one process to the others, and kept on disk: under a key of all that
it depends on (the file's content, the tokenizer, limits, this module's version), with a mark for each record of the
sizes and times of its files. Records whose files have changed are looked at again, the others are not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mm_datafmt import Sample
from mm_finetune.config import DataConfig
from mm_finetune.data.cache import cache_file, load_arrays, one_at_a_time, save_arrays
from mm_finetune.data.encoder import Encoder, Grid, Media
from mm_finetune.data.faults import Fault
from mm_finetune.errors import DataError
from mm_finetune.template import Segment

VERSION = 1  # of what is stored and of how lengths are found; an old cache is not read
CHUNK = 64  # records that one thread takes: one call of the tokenizer
THREADS = min(32, os.cpu_count() or 1)
ARRAYS = (
    "tokens", "loss_tokens", "patches", "largest", "cut", "marks", "images", "offsets", "grids", "seconds",
)  # fmt: skip
T = TypeVar("T")
S = TypeVar("S")


NO_MEDIA = Media()


@dataclass(frozen=True)
class Row:
    """One record: its numbers as in :class:`Index`."""

    tokens: int = 0
    loss_tokens: int = 0
    patches: int = 0
    largest: int = 0
    cut: bool = False
    media: Media = NO_MEDIA
    fault: tuple[str, str] | None = None


@dataclass(frozen=True, eq=False)
class Index:
    """All records of a data set. One entry a record; a record without tokens is not used.

    Attributes:
        tokens: length in tokens as it is trained on; 0: left out.
        loss_tokens: tokens of it that carry loss.
        patches: patches of its pictures and videos together.
        largest: patches of the largest step of their grids.
        cut: it was too long, and was shortened or left out.
        marks: sizes and times of its files in one number.
        images: number of its pictures, videos not counted.
        offsets: where its media begin in the next two; one entry more than records.
        grids: ``[media, 3]``: pictures, then videos of each record, before anything was cut off.
        seconds: ``[media]``: seconds between two steps of a video's grid, 0 for a picture.
        faults: ``(record, code, message)`` of the bad ones.
    """

    tokens: NDArray[np.int32]
    loss_tokens: NDArray[np.int32]
    patches: NDArray[np.int32]
    largest: NDArray[np.int32]
    cut: NDArray[np.bool_]
    marks: NDArray[np.uint64]
    images: NDArray[np.int32]
    offsets: NDArray[np.int64]
    grids: NDArray[np.int32]
    seconds: NDArray[np.float32]
    faults: tuple[Fault, ...]

    @property
    def usable(self) -> NDArray[np.int64]:
        """Numbers of the records that are trained on, rising."""
        return np.flatnonzero(self.tokens)

    @property
    def order_key(self) -> str:
        """Digest: runs with the same one, seed and batch size take the same records at the same steps."""
        return hashlib.blake2b(self.usable.tobytes(), digest_size=16).hexdigest()

    def media(self, number: int) -> Media:
        """The grids of a record."""
        begin, end = self.offsets[number : number + 2]
        split = begin + self.images[number]
        grids = [tuple(grid) for grid in self.grids[begin:end].tolist()]
        count = int(split - begin)
        return Media(tuple(grids[:count]), tuple(grids[count:]), tuple(self.seconds[split:end].tolist()))

    def described(self) -> str:
        """One line: how many records, tokens, shortened, left out, bad."""
        used, bad = int(np.count_nonzero(self.tokens)), len(self.faults)
        shortened = int(np.count_nonzero(self.cut & (self.tokens > 0)))
        left_out = len(self.tokens) - used - bad
        longest, mean = (int(self.tokens.max()), int(self.tokens.sum()) // used) if used else (0, 0)
        return (
            f"{used} of {len(self.tokens)} records, {mean} tokens on average, {longest} at most;"
            f" {shortened} shortened, {left_out} left out for their length, {bad} bad"
        )


def build_index(encoder: Encoder, samples: Sequence[Sample], *, progress: bool = False) -> Index:
    """Look at every record, or take what was found last time.

    Args:
        encoder: of the model and the limits.
        samples: the records of ``encoder.config.path``.
        progress: show a bar on a terminal.
    """
    file = cache_file(encoder, "lengths", VERSION)
    marks = np.array(list(_mapped(lambda s: _mark(encoder, s), samples, "files", progress)), dtype=np.uint64)
    with one_at_a_time(file, encoder.config.path):
        return _looked(encoder, samples, marks, file, progress)


def _looked(
    encoder: Encoder, samples: Sequence[Sample], marks: NDArray[np.uint64], file: Path, progress: bool
) -> Index:
    known = _load(file, len(samples))
    if known is None:
        stale: Sequence[int] = range(len(samples))
    else:
        stale = np.flatnonzero(known.marks != marks).tolist()
        if not stale:
            return known
    chunks = [stale[start : start + CHUNK] for start in range(0, len(stale), CHUNK)]
    looked = _mapped(lambda chunk: examine(encoder, samples, chunk), chunks, "x 64 records", progress)
    rows = {} if known is None else _rows(known)
    rows.update(zip(stale, (row for chunk in looked for row in chunk), strict=True))
    index = _index([rows[number] for number in range(len(samples))], marks)
    _save(index, file)
    return index


def examine(encoder: Encoder, samples: Sequence[Sample], numbers: Sequence[int]) -> list[Row]:
    """Rows of some records, tokenised in one go."""
    seen = {number: _before_tokens(encoder, samples[number]) for number in numbers}
    texts = [piece.text for found in seen.values() if not isinstance(found, Row) for piece in found[0]]
    ids = iter(encoder.tokenize(texts) if texts else [])
    rows = []
    for found in seen.values():
        if isinstance(found, Row):
            rows.append(found)
        else:
            pieces, media = found
            rows.append(_measured(encoder, pieces, [next(ids) for _ in pieces], media))
    return rows


def _before_tokens(encoder: Encoder, sample: Sample) -> Row | tuple[list[Segment], Media]:
    missing = [path for path in encoder.paths([*sample.images, *sample.videos]) if not path.exists()]
    if missing:
        return Row(fault=("missing", str(missing[0])))
    try:
        pieces = encoder.segments(sample)
    except DataError as error:
        return Row(fault=("conversation", str(error)))
    try:
        return pieces, encoder.media(sample)
    except DataError as error:
        return Row(fault=("unreadable", str(error)))


def _measured(encoder: Encoder, pieces: list[Segment], ids: list[list[int]], media: Media) -> Row:
    config = encoder.config
    try:
        short, encoded = encoder.conversation(pieces, ids, media)
    except DataError as error:
        return Row(fault=("conversation", str(error)))
    if not short.turns:
        if config.truncate == "drop":
            return Row(cut=True, media=media)
        return Row(cut=True, media=media, fault=("too_long", _too_long(config, short.length)))
    # The first token is predicted by nothing.
    weights = encoded.weights[1:]
    weighed = len(weights) - weights.count(0.0)
    if not weighed:
        return Row(cut=short.cut, media=media, fault=("no_loss", "no token carries loss; is every answer silent?"))
    grids = [*media.images[: short.images], *media.videos[: short.videos]]
    patches = sum(t * h * w for t, h, w in grids)
    largest = max((h * w for _, h, w in grids), default=0)
    return Row(len(encoded.input_ids), weighed, patches, largest, short.cut, media)


def _too_long(config: DataConfig, length: int) -> str:
    return (
        f"it has {length} tokens, data.seq_length is {config.seq_length};"
        " raise it, lower data.max_pixels, or choose another data.truncate"
    )


def _index(rows: Sequence[Row], marks: NDArray[np.uint64]) -> Index:
    media = [row.media for row in rows]
    grids: list[Grid] = [grid for one in media for grid in (*one.images, *one.videos)]
    seconds = [second for one in media for second in ([0.0] * len(one.images) + list(one.second_per_grid))]
    counts = [len(one.images) + len(one.videos) for one in media]
    return Index(
        tokens=np.array([row.tokens for row in rows], dtype=np.int32),
        loss_tokens=np.array([row.loss_tokens for row in rows], dtype=np.int32),
        patches=np.array([row.patches for row in rows], dtype=np.int32),
        largest=np.array([row.largest for row in rows], dtype=np.int32),
        cut=np.array([row.cut for row in rows], dtype=np.bool_),
        marks=marks,
        images=np.array([len(one.images) for one in media], dtype=np.int32),
        offsets=np.cumsum([0, *counts], dtype=np.int64),
        grids=np.array(grids, dtype=np.int32).reshape(-1, 3),
        seconds=np.array(seconds, dtype=np.float32),
        faults=tuple(Fault(n, *row.fault) for n, row in enumerate(rows) if row.fault),
    )


def _rows(index: Index) -> dict[int, Row]:
    """The records of an index as the rows that it was made from."""
    faults = {fault.record: (fault.code, fault.message) for fault in index.faults}
    return {
        n: Row(
            int(index.tokens[n]), int(index.loss_tokens[n]), int(index.patches[n]), int(index.largest[n]),
            bool(index.cut[n]), index.media(n), faults.get(n),
        )
        for n in range(len(index.tokens))
    }  # fmt: skip


def _mark(encoder: Encoder, sample: Sample) -> int:
    """Sizes and times of a record's files in 64 bits; a missing file has a mark too."""
    digest = hashlib.blake2b(digest_size=8)
    for path in encoder.paths([*sample.images, *sample.videos]):
        try:
            status = path.stat()
        except (OSError, ValueError):
            digest.update(b"missing")
        else:
            digest.update(b"%d,%d;" % (status.st_size, status.st_mtime_ns))
    return int.from_bytes(digest.digest(), "little")


def _mapped(function: Callable[[S], T], items: Sequence[S], unit: str, progress: bool) -> Iterator[T]:
    """In threads, in order; headers wait for the disk, and the tokenizer lets others run."""
    from tqdm import tqdm

    with ThreadPoolExecutor(THREADS) as pool:
        # disable=None: silent where there is no terminal.
        bar = tqdm(total=len(items), unit=f" {unit}", delay=2, disable=None if progress else True)
        for result in pool.map(function, items):
            yield result
            bar.update()
        bar.close()


def _load(file: Path, count: int) -> Index | None:
    """What was saved, or None: nothing, or not a whole file of this number of records."""
    arrays = load_arrays(file, [*ARRAYS, "faults"], count)
    if arrays is None:
        return None
    try:
        faults = tuple(Fault(*row) for row in json.loads(arrays.pop("faults").tobytes()))
    except (ValueError, TypeError):
        return None
    return Index(**arrays, faults=faults)


def _save(index: Index, file: Path) -> None:
    faults = np.frombuffer(json.dumps(index.faults).encode(), dtype=np.uint8)
    save_arrays(file, {**{name: getattr(index, name) for name in ARRAYS}, "faults": faults})
