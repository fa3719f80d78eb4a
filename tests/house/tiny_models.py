"""Tiny models of transformers: what their configuration, their names and their shapes are.

mm-convert does not depend on transformers, so its tests read what is recorded here:
``python tests/house/tiny_models.py`` writes it anew, and a test compares it with the installed transformers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

RECORDED = Path(__file__).resolve().parents[2] / "packages/mm-convert/tests/recorded"

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3_TEXT = {**TEXT, "head_dim": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}
TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
QWEN2_VISION = {"depth": 3, "embed_dim": 8, "hidden_size": 16, "num_heads": 4, "patch_size": 2}
QWEN2_5_VISION = {
    "depth": 3,
    "hidden_size": 8,
    "out_hidden_size": 16,
    "intermediate_size": 12,
    "num_heads": 4,
    "patch_size": 2,
}
QWEN3_VISION = {
    "depth": 4,
    "hidden_size": 8,
    "out_hidden_size": 16,
    "intermediate_size": 12,
    "num_heads": 4,
    "patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [1, 3],
}
OMNI_AUDIO = {
    "num_mel_bins": 6,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 12,
    "d_model": 8,
    "output_dim": 16,
    "max_source_positions": 20,
}
# Heads and vocabulary that no tensor-parallel size divides, as InternViT-6B has.
INTERN_VISION = {
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "hidden_size": 20,
    "intermediate_size": 12,
    "image_size": [4, 4],
    "patch_size": [2, 2],
}
INTERN_TEXT = {**TEXT, "vocab_size": 33, "pad_token_id": 0}
INTERN = {"image_token_id": 3, "tie_word_embeddings": False}

MODELS: Mapping[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config={**TEXT, **MROPE}, vision_config=QWEN2_VISION, **TOKENS)
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config={**TEXT, **MROPE}, vision_config=QWEN2_5_VISION, **TOKENS)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3_TEXT)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN3_TEXT, **EXPERTS)),
    "qwen3_vl_moe": lambda: transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(
            text_config={**QWEN3_TEXT, **EXPERTS, **MROPE}, vision_config=QWEN3_VISION, **TOKENS
        )
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config={**QWEN3_TEXT, **MROPE}, vision_config=QWEN3_VISION, **TOKENS)
    ),
    "qwen2_5_omni": lambda: transformers.Qwen2_5OmniThinkerForConditionalGeneration(
        transformers.Qwen2_5OmniThinkerConfig(
            text_config={**TEXT, **MROPE}, vision_config=QWEN2_5_VISION, audio_config=OMNI_AUDIO
        )
    ),
    "internvl": lambda: transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            text_config={**INTERN_TEXT, "model_type": "qwen2"},
            vision_config={**INTERN_VISION, "attention_bias": True},
            **INTERN,
        )
    ),
    "internvl_6b": lambda: transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            text_config={**INTERN_TEXT, "model_type": "llama"},
            vision_config={**INTERN_VISION, "norm_type": "rms_norm", "use_qk_norm": True},
            **INTERN,
        )
    ),
}


def record(model: str) -> dict[str, Any]:
    """A model's ``config.json`` and the shapes of its tensors, in memory and as `save_pretrained` writes them."""
    with torch.device("cpu"), tempfile.TemporaryDirectory() as directory:
        made = MODELS[model]()
        made.save_pretrained(directory)
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        with safe_open(Path(directory) / "model.safetensors", framework="pt") as file:
            saved = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        in_memory = {name: list(tensor.shape) for name, tensor in sorted(made.state_dict().items())}
    return {"library": "transformers", "config": config, "saved": saved, "in_memory": in_memory}


def main() -> None:
    """Write every record."""
    RECORDED.mkdir(exist_ok=True)
    for model in MODELS:
        text = json.dumps(record(model), indent=None, sort_keys=True).replace("], ", "],\n")
        (RECORDED / f"{model}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
