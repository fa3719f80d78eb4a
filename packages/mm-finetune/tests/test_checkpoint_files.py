"""Files of a checkpoint: what safetensors reads of them, and pieces that any layout is put together from."""

from __future__ import annotations

import random
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mm_finetune.checkpointing.files import Tensors, write_tensors
from mm_finetune.checkpointing.pieces import PARAM, Box, Piece
from mm_finetune.checkpointing.state import SavedState, assembled, rank_file
from mm_finetune.errors import CheckpointError


def test_the_format_is_safetensors_and_notes_come_back(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5, dtype=torch.bfloat16),
        "number": torch.tensor(2.5),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "turned": torch.randn(4, 6).t(),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"step": 1, "names": ["é"]})
    theirs, ours = load_file(tmp_path / "a.safetensors"), Tensors(tmp_path / "a.safetensors")
    assert ours.names == theirs.keys() == tensors.keys()
    assert ours.notes == {"step": 1, "names": ["é"]}
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours[name], tensor)


def cuts(size: int, draw: random.Random, parts: int) -> list[tuple[int, int]]:
    """A range in up to `parts` parts of any length."""
    bounds = sorted({0, size, *(draw.randrange(size + 1) for _ in range(parts - 1))})
    return list(pairwise(bounds))


def boxes(shape: tuple[int, int], draw: random.Random) -> list[Box]:
    return [
        Box(key="weight", whole=shape, offset=(top, left), shape=(bottom - top, right - left))
        for (top, bottom), (left, right) in product(cuts(shape[0], draw, 3), cuts(shape[1], draw, 2))
    ]


def part(whole: Tensor, box: Box) -> Tensor:
    """What a box is, by slices alone."""
    (top, left), (height, width) = box.offset, box.shape
    return whole[top : top + height, left : left + width].reshape(-1)


def piece(box: Box, start: int, stop: int) -> Piece:
    return Piece(
        box=box, start=start, stop=stop, begin=0, main=torch.empty(stop - start), dtype=torch.float32, state={},
        group={}, replica=0,
    )  # fmt: skip


def save(folder: Path, whole: Tensor, draw: random.Random, lost: int | None = None) -> SavedState:
    """In boxes, each in flat ranges, on three processes; `lost` is a range that is left out."""
    shape = (whole.shape[0], whole.shape[1])
    ranges = [(box, *bounds) for box in boxes(shape, draw) for bounds in cuts(box.size, draw, 3)]
    if lost is not None:
        del ranges[lost % len(ranges)]
    draw.shuffle(ranges)
    for rank in range(3):
        mine = ranges[rank::3]
        tensors = {f"{n}.{PARAM}": part(whole, box)[start:stop] for n, (box, start, stop) in enumerate(mine)}
        notes = [{**vars(box), "start": start, "stop": stop, "kinds": [PARAM]} for box, start, stop in mine]
        write_tensors(folder / rank_file(rank), tensors, {"pieces": notes})
    return SavedState(folder, 3)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_any_layout_is_put_together_from_any_other(
    rows: int, columns: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw, whole = random.Random(seed), torch.randn(rows, columns)
    saved = save(tmp_path_factory.mktemp("state"), whole, draw)
    for box in boxes((rows, columns), draw):
        for start, stop in cuts(box.size, draw, 2):
            values = assembled(piece(box, start, stop), PARAM, saved.sources["weight"])
            assert torch.equal(values, part(whole, box)[start:stop])


@pytest.mark.parametrize("lost", range(4))
def test_a_range_that_nobody_has_is_told(lost: int, tmp_path: Path) -> None:
    whole = torch.randn(6, 6)
    saved = save(tmp_path, whole, random.Random(lost), lost)
    box = Box(key="weight", whole=(6, 6), offset=(0, 0), shape=(6, 6))
    with pytest.raises(CheckpointError, match="does not hold all of weight"):
        assembled(piece(box, 0, 36), PARAM, saved.sources["weight"])
