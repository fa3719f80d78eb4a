"""A record as the model sees it, in words: its tokens by role, and which of them carry loss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mm_finetune.template import IGNORE, IMAGE_PAD, VIDEO_PAD

if TYPE_CHECKING:
    from mm_finetune.data import EncodedSample, Index

TEXT_WIDTH = 88
BAR_WIDTH = 40
BINS = 10
PATCH = 14  # pixels a side; both models have it
_PADS = re.compile(f"(?:{re.escape(IMAGE_PAD)})+|(?:{re.escape(VIDEO_PAD)})+")


def preview(sample: EncodedSample, tokenizer: Any) -> str:
    """A line for each piece of a conversation: its role, tokens, whether they carry loss, and the text."""
    rows = [
        f"  {role:9}  {len(ids):>6} tokens  {'loss' if carries else '    '}  {_shown(tokenizer.decode(ids))}"
        for role, ids, carries in _pieces(sample, tokenizer)
    ]
    return "\n".join([*rows, *_pictures(sample)])


def histogram(index: Index) -> str:
    """Lengths of the records that are used, in ten equal steps."""
    lengths = [int(length) for length in index.tokens if length]
    step = -(-max(lengths) // BINS)
    counts = [0] * BINS
    for length in lengths:
        counts[(length - 1) // step] += 1
    most = max(counts)
    bars = ["#" * -(-count * BAR_WIDTH // most) for count in counts]
    return "\n".join(
        f"  {number * step + 1:>7} - {(number + 1) * step:<7} {count:>8}  {bar}".rstrip()
        for number, (count, bar) in enumerate(zip(counts, bars, strict=True))
    )


def _pieces(sample: EncodedSample, tokenizer: Any) -> Iterator[tuple[str, list[int], bool]]:
    """Runs of tokens of one turn that carry loss, or do not."""
    ids, carries = sample.input_ids.tolist(), (sample.labels != IGNORE).tolist()
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    turn, keys = 0, []
    for token, carried in zip(ids, carries, strict=True):
        turn += token == begin
        keys.append((turn, carried))
    role = ""
    for (_, carried), run in groupby(zip(keys, ids, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in run]
        if tokens[0] == begin:
            role = tokenizer.decode(tokens[1:]).split("\n", 1)[0].strip()
        yield _shown(role)[:9], tokens, carried


def _shown(text: str) -> str:
    """On one line, without what a terminal would take for orders; rows of pads as one."""
    short = _PADS.sub(lambda match: f"{match[0][:13]} x {len(match[0]) // 13}", text)
    plain = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in short
    )  # fmt: skip
    return plain if len(plain) <= TEXT_WIDTH else f"{plain[: TEXT_WIDTH - 14]} … {plain[-11:]}"


def _pictures(sample: EncodedSample) -> list[str]:
    grids: Sequence[tuple[str, Any]] = (
        ("picture", None if sample.images is None else sample.images.image_grid_thw),
        ("video", None if sample.videos is None else sample.videos.video_grid_thw),
    )
    return [
        f"  {kind} {number}: {h * PATCH} x {w * PATCH} pixels" + (f" x {2 * t} frames" if kind == "video" else "")
        + f", {t * h * w // 4} tokens"
        for kind, grid in grids
        if grid is not None
        for number, (t, h, w) in enumerate(grid.tolist(), 1)
    ]  # fmt: skip
