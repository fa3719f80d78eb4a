"""Against transformers' get_rope_index, and against the words of the published rule where that differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_finetune.rope import mrope_positions

IMAGE, VIDEO, START = 90, 91, 88


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                       "fullatt_block_indexes": [0], "tokens_per_second": 2},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=89,
    )  # fmt: skip
    return Qwen2_5_VLModel(config)


@settings(max_examples=60, deadline=None)
@given(
    grids=st.lists(st.tuples(st.just(1), st.integers(1, 9), st.integers(1, 9)), max_size=4),
    texts=st.lists(st.integers(1, 7), min_size=5, max_size=5),
)
def test_equals_transformers(model: Any, grids: list[tuple[int, int, int]], texts: list[int]) -> None:
    ids = [3] * texts[0]
    for (t, h, w), length in zip(grids, texts[1:], strict=False):
        ids += [START, *[IMAGE] * (t * h * w), 89, *[4] * length]
    thw = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in grids], dtype=torch.long).view(-1, 3)
    tokens = torch.tensor([ids])
    expected, _ = model.get_rope_index(
        tokens, mm_token_type_ids=(tokens == IMAGE).int(), image_grid_thw=thw if len(thw) else None
    )
    assert torch.equal(mrope_positions(ids, thw, image_token_id=IMAGE), expected[:, 0].long())


@pytest.mark.parametrize(("ids", "grids"), [([1, IMAGE, 1], [[1, 4, 4]]), ([1, IMAGE], []), ([1, 1], [[1, 2, 2]])])
def test_grids_that_do_not_match(ids: list[int], grids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="image tokens"):
        mrope_positions(ids, torch.tensor(grids, dtype=torch.long).view(-1, 3), image_token_id=IMAGE)


@settings(max_examples=60, deadline=None)
@given(
    media=st.lists(
        st.tuples(
            st.booleans(), st.integers(1, 4), st.integers(5, 9), st.integers(1, 9), st.sampled_from([0.1, 0.4, 0.55])
        ),
        max_size=4,
    ),
    texts=st.lists(st.integers(1, 7), min_size=5, max_size=5),
)
def test_pictures_and_videos_equal_transformers(
    model: Any, media: list[tuple[bool, int, int, int, float]], texts: list[int]
) -> None:
    """Videos that last no longer than they are high: 2 time steps a second, at most 3 of 0.55 s, 5 rows or more."""
    ids = [3] * texts[0]
    images: list[tuple[int, int, int]] = []
    videos: list[tuple[int, int, int]] = []
    seconds: list[float] = []
    for (is_video, t, h, w, second), length in zip(media, texts[1:], strict=False):
        frames = t if is_video else 1
        token = VIDEO if is_video else IMAGE
        ids += [START, *[token] * (frames * h * w), 89, *[4] * length]
        (videos if is_video else images).append((frames, 2 * h, 2 * w))
        seconds += [second] if is_video else []
    tokens = torch.tensor([ids])
    kinds = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    image_grid, video_grid = (torch.tensor(g, dtype=torch.long).view(-1, 3) for g in (images, videos))
    expected, _ = model.get_rope_index(
        tokens,
        mm_token_type_ids=kinds,
        image_grid_thw=image_grid if images else None,
        video_grid_thw=video_grid if videos else None,
        second_per_grid_ts=torch.tensor(seconds) if videos else None,
    )
    ours = mrope_positions(
        ids, image_grid, image_token_id=IMAGE, video_grid_thw=video_grid, video_token_id=VIDEO,
        second_per_grid_ts=seconds, tokens_per_second=2,
    )  # fmt: skip
    assert torch.equal(ours, expected[:, 0].long())


def test_text_behind_a_long_video_goes_on_after_its_last_moment(model: Any) -> None:
    """As transformers 4 documents it ("the max vision position_ids plus 1") and vLLM does; transformers 5 does not."""
    ids = [3, *[VIDEO] * (3 * 4), 4]
    positions = mrope_positions(
        ids, torch.zeros(0, 3, dtype=torch.long), image_token_id=IMAGE, video_grid_thw=torch.tensor([[3, 4, 4]]),
        video_token_id=VIDEO, second_per_grid_ts=[5.0], tokens_per_second=2,
    )  # fmt: skip
    assert positions[0].tolist() == [0, *[1] * 4, *[11] * 4, *[21] * 4, 22]
    assert positions[1].tolist() == [0, *[1, 1, 2, 2] * 3, 22]
    assert positions[2].tolist() == [0, *[1, 2, 1, 2] * 3, 22]
    tokens = torch.tensor([ids])
    theirs, delta = model.get_rope_index(
        tokens, mm_token_type_ids=2 * (tokens == VIDEO).int(), video_grid_thw=torch.tensor([[3, 4, 4]]),
        second_per_grid_ts=torch.tensor([5.0]),
    )  # fmt: skip
    assert torch.equal(theirs[:, 0, :-1], positions[:, :-1])
    assert theirs[:, 0, -1].tolist() == [3, 3, 3], "when this fails, transformers has come back: rope.py says otherwise"
    assert int(delta) + len(ids) == 22, "where it goes on itself when it generates"


def test_every_video_has_its_rate() -> None:
    with pytest.raises(ValueError, match="1 videos, but 0 of second_per_grid_ts"):
        mrope_positions(
            [VIDEO], torch.zeros(0, 3, dtype=torch.long), image_token_id=IMAGE,
            video_grid_thw=torch.tensor([[1, 2, 2]]), video_token_id=VIDEO,
        )  # fmt: skip
