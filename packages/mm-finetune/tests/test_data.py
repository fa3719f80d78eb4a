"""Order and padding. Encoding is tested in test_template and test_images, the whole in test_training."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_finetune.data import EncodedSample, collate, order, step_numbers
from mm_finetune.images import ImageInputs


@given(count=st.integers(1, 50), batch=st.integers(1, 70), seed=st.integers(0, 9))
def test_steps_walk_through_whole_permutations(count: int, batch: int, seed: int) -> None:
    steps = -(-3 * count // batch)
    seen = [n for s in range(1, steps + 1) for n in step_numbers(count, s, global_batch_size=batch, seed=seed)]
    assert len(seen) == steps * batch
    for epoch in range(3):
        part = seen[epoch * count : (epoch + 1) * count]
        assert sorted(part) == list(range(count)), "every record once an epoch"
        assert part == order(count, seed=seed, epoch=epoch)


def test_order_depends_on_seed_and_epoch() -> None:
    assert order(20, seed=0, epoch=0) == order(20, seed=0, epoch=0)
    assert len({tuple(order(20, seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9


def encoded(ids: list[int], labels: list[int], *, image: bool) -> EncodedSample:
    inputs = ImageInputs(torch.full((4, 1176), float(ids[0])), torch.tensor([[1, 2, 2]]), (1,))
    return EncodedSample(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        positions=torch.arange(len(ids)).expand(3, -1),
        images=inputs if image else None,
    )


def test_labels_are_the_next_token_and_padding_has_no_loss() -> None:
    batch = collate([encoded([5, 6, 7, 8], [-100, -100, 7, 8], image=True), encoded([9, 4], [-100, 4], image=False)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert (batch.labels * batch.loss_mask).tolist() == [[0, 7, 8, 0], [4, 0, 0, 0]]
    assert batch.position_ids.shape == (3, 2, 4)
    assert batch.position_ids[0].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.tokens == 6
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (4, 1176)


def test_a_batch_of_text_has_no_pictures() -> None:
    batch = collate([encoded([5, 6], [-100, 6], image=False)])
    assert batch.pixel_values is None
    assert batch.image_grid_thw is None
    assert batch.to(torch.device("cpu")).input_ids.tolist() == [[5, 6]]
