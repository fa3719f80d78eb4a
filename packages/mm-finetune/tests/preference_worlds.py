"""Pairs of answers about handwritten digits, the right one chosen, a wrong one rejected."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mm_convert import Converter, Layout
from mm_finetune.mini.data import digits


def digit_pairs(folder: Path, count: int) -> list[dict[str, Any]]:
    """TRL's layout, one digit a pair; the pictures are written into the folder."""
    rng = random.Random(0)
    pairs = []
    for number, example in enumerate(digits(seed=0, train=count, heldout=1).train):
        example.picture.save(folder / f"{number}.png", compress_level=1)
        wrong = rng.choice([digit for digit in "0123456789" if digit != example.answer])
        pairs.append(
            {
                "prompt": [{"role": "user", "content": example.question}],
                "chosen": [{"role": "assistant", "content": example.answer}],
                "rejected": [{"role": "assistant", "content": wrong}],
                "images": [f"{number}.png"],
            }
        )
    return pairs


def preference_world(folder: Path, mini: Path, count: int) -> Path:
    """Model, pairs and a configuration of one process; returns that."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.json").write_text(json.dumps(digit_pairs(folder, count)))
    layout = Layout(llm_pp_layers=[[4]], vit_pp_layers=[[4]])  # type: ignore[arg-type]
    Converter.named("Qwen2_5_VLConverter").hf_to_mm(mini / "hf", folder / "mm", layout)
    (folder / "train.yaml").write_text(
        f"model: {{hf_dir: {mini}/hf, load: mm}}\n"
        "data: {path: pairs.json, seq_length: 64, cache_dir: cache}\n"
        "train: {steps: 2, global_batch_size: 4, micro_batch_size: 2, lr: 1.0e-3}\n"
        "preference: dpo\n"
        "output: {dir: run, overwrite: true}\n"
    )
    return folder / "train.yaml"
