"""Loss weights by hand, and the sizes that layouts ask for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mm_finetune.data import Batch
from mm_finetune.engine.micro_batches import loss_weights, padded, topped_up

# Three samples of 3, 1 and 2 tokens; the second carries no loss.
MASKS = [[1.0, 0.0, 1.0], [0.0], [0.5, 0.0]]


def batch(*, packed: bool) -> Batch:
    longest = max(map(len, MASKS))
    rows = [[w for mask in MASKS for w in mask]] if packed else [m + [0.0] * (longest - len(m)) for m in MASKS]
    mask = torch.tensor(rows)
    ids = torch.arange(mask.numel()).view_as(mask) + 1
    return Batch(
        input_ids=ids, labels=ids, loss_mask=mask, position_ids=ids.expand(3, -1, -1), pixel_values=torch.ones(4, 6),
        image_grid_thw=torch.tensor([[1, 2, 2]]), tokens=6, numbers=(7, 8, 9),
        cu_seqlens=torch.tensor([0, 3, 4, 6], dtype=torch.int32) if packed else None,
    )  # fmt: skip


def of_tokens(weights: Tensor, packed: bool) -> list[float]:
    """The weights of the six tokens, padding left out."""
    if packed:
        return weights.flatten().tolist()
    return [w for row, mask in zip(weights.tolist(), MASKS, strict=True) for w in row[: len(mask)]]


@pytest.mark.parametrize("packed", [False, True])
def test_token_loss(packed: bool) -> None:
    weights, divisor = loss_weights(batch(packed=packed), "token")
    assert of_tokens(weights, packed) == [1, 0, 1, 0, 0.5, 0]
    assert divisor == 2.5


@pytest.mark.parametrize("packed", [False, True])
def test_sample_loss(packed: bool) -> None:
    weights, divisor = loss_weights(batch(packed=packed), "sample")
    assert of_tokens(weights, packed) == [0.5, 0, 0.5, 0, 1, 0], "each sample's own mean"
    assert divisor == 2, "a sample without loss is none"


def test_padding_of_a_packed_row_is_a_sample_of_its_own() -> None:
    given = batch(packed=True)
    result = padded(given, 4)
    assert result.input_ids.shape == result.labels.shape == result.loss_mask.shape == (1, 8)
    assert result.position_ids.shape == (3, 1, 8)
    assert result.cu_seqlens is not None
    assert result.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    assert result.cu_seqlens.dtype == torch.int32
    assert not result.loss_mask[:, 6:].any()
    assert result.tokens == given.tokens
    assert padded(given, 3) is given


def test_padding_of_rows_stands_on_the_right() -> None:
    given = batch(packed=False)
    result = padded(given, 2)
    assert result.input_ids.shape == (3, 4)
    assert torch.equal(result.input_ids[:, :3], given.input_ids)
    assert result.cu_seqlens is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("multiple", "count"), [(1, 3), (2, 4), (4, 4)])
def test_topping_up(packed: bool, multiple: int, count: int) -> None:
    given = [batch(packed=packed)] * 3
    result = topped_up(given, multiple)
    assert len(result) == count
    assert result[:3] == given
    for added in result[3:]:
        assert added.input_ids.shape == (1, 1)
        assert added.tokens == 0
        assert not added.loss_mask.any()
        assert added.pixel_values is None
        assert added.numbers == ()
