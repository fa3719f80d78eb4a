"""The model of a run: this process's part of it, with its weights, ready to be trained."""

from __future__ import annotations

from typing import Any

import torch

from mm_finetune.config import TrainConfig
from mm_finetune.engine.lora import adapt, adapters_of
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks
from mm_finetune.engine.weights import Checkpoint
from mm_finetune.selection import common_rate, rates_of


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
        ConfigError: the model does not fit the parallel sizes, or patterns of the run do not fit the model.
        CheckpointError: the adapter that it begins with does not fit.
    """
    model = QwenVL(hf_config, config.parallel, config.train, checkpoint.stages, ranks)
    checkpoint.load(model, ranks)
    if config.lora is not None:
        adapt(model, checkpoint, config, ranks)
    else:
        set_rates(model, checkpoint, config, ranks)
    model.to(device)
    return model


def check_patterns(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Check what a run says of single weights, before it is built; of any rank it says the same.

    Raises:
        ConfigError: a pattern matches nothing, nothing is left, or a fused weight would train at two rates.
        CheckpointError: ``lora.load`` does not fit.
    """
    if config.lora is not None:
        adapters_of(checkpoint, config)
        return
    rates = rates_of(list(checkpoint.shapes), freeze=config.train.freeze, lr_scale=config.train.lr_scale)
    for place, published in checkpoint.published().items():
        common_rate(place.name, published, rates)


def set_rates(model: QwenVL, checkpoint: Checkpoint, config: TrainConfig, ranks: Ranks) -> None:
    """Freeze what ``train.freeze`` says, give the rest its factors of the rate; :func:`check_patterns` goes first."""
    if not config.train.freeze and not config.train.lr_scale:
        return
    rates = rates_of(list(checkpoint.shapes), freeze=config.train.freeze, lr_scale=config.train.lr_scale)
    for weight in checkpoint.weights_of(model, ranks):
        rate = common_rate(weight.path, weight.published, rates)
        weight.parameter.requires_grad_(rate > 0)
        # Where the optimizer looks for it.
        weight.parameter.lr_mult = rate  # type: ignore[attr-defined]
