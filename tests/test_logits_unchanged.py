"""transformers' models say the same, bit for bit, after their weights went through mm-convert and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from house.tiny_models import MODELS, TOKENS
from mm_convert import Converter, Layout

CONVERTERS = {
    "qwen2_vl": "Qwen2VLConverter",
    "qwen2_5_vl": "Qwen2_5_VLConverter",
    "qwen2": "Qwen2_5Converter",
    "qwen3": "Qwen3Converter",
    "qwen3_vl": "Qwen3VLMegatronConverter",
}
VISION_LAYERS = {"qwen2_vl": 3, "qwen2_5_vl": 3, "qwen3_vl": 4}
PATCHES = (1, 4, 4)  # one picture of 4 x 4 patches, of which 2 x 2 become a token


def layout(model: str, rows: tuple[tuple[int, ...], ...], tp_size: int) -> Layout:
    """The language layers as told, the vision layers on the first stage."""
    if model not in VISION_LAYERS:
        return Layout(llm_pp_layers=rows, tp_size=tp_size)
    first, *others = ((0,) * len(row) for row in rows)
    vision = ((VISION_LAYERS[model], *first[1:]), *others)
    return Layout(llm_pp_layers=rows, vit_pp_layers=vision, tp_size=tp_size)


# The recorded models have heads of two elements, too few for positions in two dimensions to turn.
HEADS_OF_FOUR = {
    "qwen2_vl": ({"hidden_size": 32}, {"embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": ({"hidden_size": 32}, {"hidden_size": 16, "out_hidden_size": 32}),
    "qwen3_vl": ({}, {"hidden_size": 16}),
}


def filled(model: str) -> Any:
    """No two numbers the same, where a new model has zeros for biases and ones for norms."""
    torch.manual_seed(0)
    made = MODELS[model]()
    if model in HEADS_OF_FOUR:
        text, vision = HEADS_OF_FOUR[model]
        made.config.text_config.update(text)
        made.config.vision_config.update(vision)
        made = type(made)(made.config)
    made.eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def inputs(model: str) -> dict[str, Tensor]:
    """A sentence; for a model that sees, with a picture in it."""
    if model not in VISION_LAYERS:
        return {"input_ids": torch.tensor([[7, 8, 9, 10, 11]])}
    image = [TOKENS["vision_start_token_id"], *[TOKENS["image_token_id"]] * 4]
    ids = torch.tensor([[7, *image, 8, 9, 10]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == TOKENS["image_token_id"]).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 2 * 2),
        "image_grid_thw": torch.tensor([PATCHES]),
    }


@torch.inference_mode()
def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    made: Tensor = model(**given).logits
    assert made.isfinite().all()
    return made


@pytest.mark.parametrize("model", CONVERTERS)
def test_the_way_there_and_back(model: str, tmp_path: Path) -> None:
    converter = Converter.named(CONVERTERS[model])
    hf, mm, again, back = (tmp_path / name for name in ("hf", "mm", "again", "back"))
    original = filled(model)
    original.save_pretrained(hf)
    converter.hf_to_mm(hf, mm, layout(model, ((2, 3),), 2))
    converter.mm_to_hf(mm, hf, back)
    given = inputs(model)
    expected = logits(original, given)
    assert torch.equal(logits(type(original).from_pretrained(back), given), expected)
    # Over another layout in between: three stages in two rounds, each layer's matrices cut in four.
    converter.resplit(mm, again, layout(model, ((1, 0, 1), (1, 1, 1)), 4), hf_dir=hf)
    converter.mm_to_hf(again, hf, back, overwrite=True)
    assert torch.equal(logits(type(original).from_pretrained(back), given), expected)


def test_the_picture_counts() -> None:
    for model in VISION_LAYERS:
        made, given = filled(model), inputs(model)
        other = {**given, "pixel_values": -given["pixel_values"]}
        assert not torch.equal(logits(made, given), logits(made, other))
