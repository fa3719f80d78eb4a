"""Samples side by side. Encoding is tested in test_template and test_images, the whole in test_loader."""

from __future__ import annotations

from dataclasses import replace

import torch

from mm_finetune.data import EncodedSample, collate
from mm_finetune.images import ImageInputs
from mm_finetune.videos import VideoInputs


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


def test_a_packed_row_keeps_its_samples_apart() -> None:
    one = replace(encoded([5, 6, 7], [-100, 6, 7], image=True), number=4)
    two = replace(encoded([9, 4], [9, 4], image=False), number=2)
    batch = collate([one, two], packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 4]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids[:, 0].tolist() == [[0, 1, 2, 0, 1]] * 3
    # The last token of a sample predicts nothing, not the first of the next one.
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 0]]
    assert (batch.labels * batch.loss_mask).tolist() == [[6, 7, 0, 4, 0]]
    assert batch.numbers == (4, 2)
    assert batch.tokens == 5


def test_weights_follow_their_labels() -> None:
    sample = replace(encoded([5, 6, 7, 8], [-100, 6, 7, -100], image=False), weights=torch.tensor([0.0, 0.5, 2.0, 0.0]))
    assert collate([sample]).loss_mask.tolist() == [[0.5, 2.0, 0, 0]]
    assert collate([sample.silenced()]).loss_mask.tolist() == [[0, 0, 0, 0]]


def test_pictures_videos_and_text_in_one_batch() -> None:
    films = [VideoInputs(torch.full((8, 1176), number), torch.tensor([[2, 2, 2]]), (1.0,)) for number in (3.0, 4.0)]
    samples = [
        encoded([5, 6], [5, 6], image=True),
        replace(encoded([7, 6], [7, 6], image=False), videos=films[0]),
        encoded([8, 6], [8, 6], image=False),
        replace(encoded([9, 6], [9, 6], image=True), videos=films[1]),
    ]
    batch = collate(samples)
    assert batch.image_grid_thw is not None
    assert batch.video_grid_thw is not None
    assert batch.image_grid_thw.tolist() == [[1, 2, 2], [1, 2, 2]]
    assert batch.video_grid_thw.tolist() == [[2, 2, 2], [2, 2, 2]]
    assert batch.pixel_values is not None
    assert batch.pixel_values_videos is not None
    assert batch.pixel_values[:, 0].tolist() == [5.0] * 4 + [9.0] * 4
    assert batch.pixel_values_videos.shape == (16, 1176)
    bare = batch.without_pixels()
    assert bare.pixel_values is None
    assert bare.pixel_values_videos is None
    assert bare.image_grid_thw is not None
