"""Against transformers' get_rope_index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_finetune.rope import mrope_positions

IMAGE, START = 90, 88


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
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=START, vision_end_token_id=89,
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
