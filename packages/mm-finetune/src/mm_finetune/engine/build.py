"""The model of a run: this process's part of it, with its weights, ready to be trained."""

from __future__ import annotations

from typing import Any

import torch

from mm_finetune.config import TrainConfig
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks, transformer_config
from mm_finetune.engine.weights import Checkpoint


def build_model(
    checkpoint: Checkpoint, config: TrainConfig, hf_config: Any, ranks: Ranks, device: torch.device
) -> QwenVL:
    """This process's part of the model.

    Args:
        checkpoint: the weights.
        config: the run.
        hf_config: transformers' ``Qwen2_5_VLConfig``.
        ranks: where this process stands.
        device: where the model goes.

    Raises:
        ConfigError: the model does not fit the parallel sizes, or ``train.freeze`` does not fit the model.
    """
    llm_pp_layers = sum(checkpoint.layout.llm_pp_layers, ())
    settings = transformer_config(hf_config.text_config, config.parallel, llm_pp_layers, config.train)
    model = QwenVL(settings, hf_config, ranks)
    checkpoint.load(model, ranks)
    if config.train.freeze:
        checkpoint.freeze(model, ranks, config.train.freeze)
    model.to(device)
    return model
