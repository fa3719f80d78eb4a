"""The data set and the models that `finetune.py` and `finetune_device.py` train with: seeded, from nothing.

Pictures are JPEGs of which the model sees 64 to 330 tokens, conversations have one to four turns whose length is
log-normal. As in LLaVA's mixture most records are short, a few very long, and questions are much shorter than answers.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PICTURE_TOKENS = (64, 330)
TEXT_ONLY = 0.1  # share of the records without a picture
MEDIAN_WORDS, SIGMA, MOST_WORDS = 110, 0.85, 1200  # of all of a record's turns
QUESTION_SHARE = 0.2
SIDE = 28  # pixels of a token's side
SYLLABLES = ["ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "xu", "za"]
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]


def write_data(folder: Path, records: int) -> Path:
    """Write `records` records with their pictures; returns the JSON in the messages format."""
    chance = random.Random(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(records):
        words = min(MOST_WORDS, max(8, round(chance.lognormvariate(math.log(MEDIAN_WORDS), SIGMA))))
        name = f"images/{number:06d}.jpg"
        pictured = chance.random() >= TEXT_ONLY
        if pictured:
            _picture(folder / name, chance)
        rows.append({"messages": _turns(chance, words, pictured), "images": [name] * pictured})
    path = folder / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Qwen2.5-VL; the tower's sizes by their names in config.json."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool
    vision: Mapping[str, int]
    full_attention: Sequence[int]

    def config(self, tokenizer: Any) -> Any:
        """For transformers, with the ids of `tokenizer`."""
        from mm_finetune.mini import model

        config = model.model_config(tokenizer)
        config.tie_word_embeddings = self.tied
        part = self.hidden // self.heads // 16
        for name, value in {
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.groups,
            "initializer_range": 0.02, "max_position_embeddings": 32768, "tie_word_embeddings": self.tied,
            "layer_types": ["full_attention"] * self.layers,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [2 * part, 3 * part, 3 * part], "rope_theta": 1e6
            },
        }.items():  # fmt: skip
            setattr(config.text_config, name, value)
        for name, value in {
            **self.vision, "out_hidden_size": self.hidden, "window_size": 112, "initializer_range": 0.02,
            "fullatt_block_indexes": list(self.full_attention),
        }.items():  # fmt: skip
            setattr(config.vision_config, name, value)
        return config


def small(*, hidden: int, layers: int, vocabulary: int) -> Size:
    """As in Qwen2.5-VL-3B the vision tower costs a token of a picture about what the decoder does."""
    heads = hidden // 64
    return Size(
        hidden=hidden, ffn=hidden * 11 // 4, layers=layers, heads=heads, groups=max(1, heads // 4),
        vocabulary=vocabulary, tied=False,
        vision={
            "depth": layers, "hidden_size": hidden // 2, "intermediate_size": hidden * 11 // 8, "num_heads": heads
        },
        full_attention=[layers // 2 - 1, layers - 1],
    )  # fmt: skip


def write_model(folder: Path, size: Size, *, longest: int, dtype: str = "float32", device: str = "cpu") -> None:
    """Write a Hugging Face folder: random weights, made on `device`, tokenizer and image processor."""
    import torch
    from transformers import AutoModelForImageTextToText

    from mm_finetune.mini import model, tokenizer

    made = tokenizer.train_tokenizer(["".join(f" {word}" for word in WORDS)] * 4)
    made.model_max_length = longest
    torch.manual_seed(0)
    with torch.device(device):
        weights = AutoModelForImageTextToText.from_config(size.config(made), dtype=getattr(torch, dtype))
    weights.save_pretrained(folder)
    made.save_pretrained(folder)
    pixels = {"min_pixels": PICTURE_TOKENS[0] * SIDE**2, "max_pixels": PICTURE_TOKENS[1] * SIDE**2}
    (folder / "preprocessor_config.json").write_text(json.dumps(model.PREPROCESSOR | pixels), encoding="utf-8")


def _turns(chance: random.Random, words: int, pictured: bool) -> list[dict[str, Any]]:
    pairs = chance.choice((1, 1, 2, 4))
    share = max(2, words // pairs)
    question = max(1, round(share * QUESTION_SHARE))
    messages = []
    for pair in range(pairs):
        mark = "<image>" if pictured and pair == 0 else ""
        messages.append({"role": "user", "content": mark + _text(chance, question)})
        messages.append({"role": "assistant", "content": _text(chance, share - question)})
    return messages


def _text(chance: random.Random, words: int) -> str:
    return "".join(f" {word}" for word in chance.choices(WORDS, k=max(1, words)))


def _picture(path: Path, chance: random.Random) -> None:
    """Soft shapes of about the size of a photograph, of a shape that is seen at the wanted number of tokens."""
    from PIL import Image

    wanted = chance.randint(*PICTURE_TOKENS)
    aspect = chance.uniform(0.6, 1.6)
    width, height = (round(SIDE * math.sqrt(wanted * factor)) for factor in (aspect, 1 / aspect))
    noise = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    # A file is larger than what the model sees of it, as most are; those of most tokens are reduced to the limit.
    scale = 1.0 if wanted < PICTURE_TOKENS[1] - SIDE else 1.5
    size = (round(width * scale), round(height * scale))
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
