"""Qwen2-VL beside Qwen2.5-VL: against transformers' own, as tests/test_parity.py does it, and from a folder of records.

Another tower (no windows, norms with biases, an MLP without a gate), other positions of videos, the same decoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_worlds import turns, write
from layouts import ask
from parity_reference import write_reference
from test_parity import check

from mm_convert import Converter, Layout
from mm_datafmt import convert, read
from mm_finetune.cli import main
from mm_finetune.data.encoder import Encoder, Media
from mm_finetune.mini import make

TWO: list[dict[str, Any]] = [
    {"variant": "qwen2_vl", "export": True},
    {"variant": "qwen2_vl", "tp": 2, "sp": True, "packed": True, "recompute": "selective"},
    {"variant": "qwen2_vl", "pp": 2, "llm": [[1, 3]], "packed": True, "export": True},
    {"variant": "qwen2_vl_tied", "tp": 2, "recompute": "full"},
]


@pytest.mark.long
def test_equals_transformers(tmp_path: Path) -> None:
    for name, tied in (("qwen2_vl", False), ("qwen2_vl_tied", True)):
        (tmp_path / name).mkdir()
        variant = {"family": "qwen2_vl", "tied": tied, "wide": False}
        write_reference(tmp_path / name, variant, kept=(2,))
    results = ask("parity_worker.py", 2, tmp_path, TWO)
    for result in results:
        check({**result, "variant": result["variant"].removeprefix("qwen2_vl_")}, 2)


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("qwen2_vl") / "mini", digits=30, heldout_digits=10, family="qwen2_vl")


def test_a_video_counts_steps_of_its_grid_not_seconds(qwen2_vl: Path, tmp_path: Path) -> None:
    """As transformers' Qwen2VLModel.get_rope_index, whatever the video's rate."""
    from transformers import AutoConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    data = write(tmp_path, [{"messages": turns("<video>\nWhat?", "It."), "images": [], "videos": ["a.mp4"]}])
    encoder = Encoder(data, qwen2_vl / "hf")
    media = Media(videos=((3, 8, 8),), second_per_grid=(0.7,))
    (sample,) = read(data.path)
    ours = encoder.encode(sample, media, 0, pixels=False)
    config = AutoConfig.from_pretrained(qwen2_vl / "hf")
    with torch.device("meta"):
        model = Qwen2VLModel(config)
    ids = ours.input_ids[None]
    kinds = 2 * (ids == config.video_token_id).int()
    expected, _ = model.get_rope_index(ids, mm_token_type_ids=kinds, video_grid_thw=torch.tensor([[3, 8, 8]]))
    assert torch.equal(ours.positions, expected[:, 0])


def test_a_run_of_the_mini_model(qwen2_vl: Path) -> None:
    convert(qwen2_vl / "data/train.llava.json", qwen2_vl / "data/train.json", image_dir=qwen2_vl / "data/images")
    layout = Layout(llm_pp_layers=[[4]], vit_pp_layers=[[4]])  # type: ignore[arg-type]
    Converter.named("Qwen2VLConverter").hf_to_mm(qwen2_vl / "hf", qwen2_vl / "mm", layout)
    small = ["train.steps=3", "train.global_batch_size=8", "train.micro_batch_size=4", "data.max_samples=8"]
    assert main(["train", str(qwen2_vl / "train.yaml"), "parallel.pp_size=1", *small]) == 0
    rows = [json.loads(line) for line in (qwen2_vl / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
