"""What tests of plans share: the sizes of published models, a load, a run that trains everything."""

from __future__ import annotations

from typing import Any

from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.load import Load
from mm_finetune.planning.weights import Training

# The published config.json of Qwen2.5-VL-7B-Instruct and Qwen2-VL-2B-Instruct: what decides on sizes.
SEVEN = {
    "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152064, "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}  # fmt: skip
TWO = {
    "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_key_value_heads": 2, "num_hidden_layers": 28, "vocab_size": 151936, "tie_word_embeddings": True,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
LOAD = Load(rows=1, length=2048, loss_tokens=2048, patches=4096, micro_batches=8)


def trained(architecture: Architecture, **how: Any) -> Training:
    """Everything trains, in bfloat16."""
    usual: dict[str, Any] = {"element": 2, "distributed": False, "recompute": "none"}
    return Training(rates=dict.fromkeys(architecture.shapes(), 1.0), **usual | how)
