"""``qwen2_5_vl-mini``: transformers' own Qwen2.5-VL or Qwen2-VL, with random weights of about five megabytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mm_finetune.mini.tokenizer import VOCAB_SIZE

HIDDEN_SIZE = 128
# 1 / sqrt(hidden size), about: a layer then keeps the size of what it is given. The usual 0.02 fits models ten times as
# wide; here it takes four times the steps to get going.
INITIALIZER_RANGE = 0.08
# Pictures of the mini data set are 56 and 112 pixels a side: 4 and 16 tokens.
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 56 * 56,
    "max_pixels": 112 * 112,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


# What the towers of the two families call differently, or have alone.
TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "hidden_size": 64, "intermediate_size": 176, "out_hidden_size": HIDDEN_SIZE, "tokens_per_second": 2,
        "window_size": 56, "fullatt_block_indexes": [1, 3],
    },
    "qwen2_vl": {"embed_dim": 64, "hidden_size": HIDDEN_SIZE, "mlp_ratio": 4},
}  # fmt: skip


def model_config(tokenizer: Any, *, family: str = "qwen2_5_vl") -> Any:
    """The configuration: every kind of block of the large models, with the ids of `tokenizer`.

    Attention with fewer key-value heads than query heads, M-RoPE, windowed and full vision blocks (Qwen2-VL: full ones
    alone), untied embeddings.

    Args:
        tokenizer: whose special tokens it knows.
        family: ``qwen2_5_vl`` or ``qwen2_vl``.
    """
    from transformers import AutoConfig

    ids = tokenizer.get_vocab()
    return AutoConfig.for_model(
        family,
        text_config={
            "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": 352, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 4, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "initializer_range": INITIALIZER_RANGE,
        } | TOWERS[family],
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip


def save_model(folder: Path, tokenizer: Any, *, seed: int, family: str = "qwen2_5_vl") -> None:
    """Write an ordinary Hugging Face folder: weights, configurations, tokenizer, image processor."""
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(model_config(tokenizer, family=family)).float()
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = json.dumps(PREPROCESSOR, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
