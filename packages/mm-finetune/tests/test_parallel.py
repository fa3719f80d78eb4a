"""Megatron's configuration: layouts that can't be, and settings without which megatron-core is silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity_reference import hf_config

from mm_finetune.config import OptimizationConfig, ParallelConfig
from mm_finetune.engine.parallel import transformer_config
from mm_finetune.errors import ConfigError

TEXT = hf_config({"tied": False, "wide": False}).text_config


def made(layers: tuple[int, ...], train: dict[str, Any] | None = None, **parallel: Any) -> Any:
    settings = OptimizationConfig(steps=1, global_batch_size=1, **train or {})
    return transformer_config(TEXT, ParallelConfig(**parallel), layers, settings)


@pytest.mark.parametrize(
    ("layers", "parallel", "words"),
    [
        ((4,), {"pp_size": 2}, "one number for each of the 2 stages"),
        ((2, 3), {"pp_size": 2}, "4 in all"),
        ((2, 2), {"vpp_size": 2}, "needs parallel.pp_size of 2 or more"),
        ((4,), {"tp_size": 3}, "tp_size 3 does not divide num_attention_heads 4"),
        ((4,), {"tp_size": 4}, "tp_size 4 does not divide num_key_value_heads 2"),
    ],
)
def test_refused(layers: tuple[int, ...], parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(layers, **parallel)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"stages.*num_attention_heads.*vocab_size"):
        made((3,), tp_size=3)


def test_interleaved_stages_never_batch_their_sends() -> None:
    """With two stages both neighbours are one process: batched, they pair up wrongly and no error says so."""
    config = made((1, 1, 1, 1), pp_size=2, vpp_size=2)
    assert config.virtual_pipeline_model_parallel_size == 2
    assert config.overlap_p2p_comm
    assert not config.batch_p2p_comm


@pytest.mark.parametrize("parallel", [{}, {"pp_size": 2, "tp_size": 2, "sequence_parallel": True}])
def test_always(parallel: dict[str, Any]) -> None:
    config = made((4,) if not parallel else (1, 3), **parallel)
    assert config.perform_initialization, "or shards are not marked, and the gradient norm leaves them out"
    assert not config.deallocate_pipeline_outputs, "or sends that are under way read freed memory"
    assert config.sequence_parallel is bool(parallel)


def test_one_rank_is_not_sequence_parallel() -> None:
    assert not made((4,), sequence_parallel=True).sequence_parallel


def test_precision() -> None:
    config = made((2, 2), {"dtype": "bf16"}, pp_size=2)
    assert config.params_dtype == config.pipeline_dtype == torch.bfloat16
    assert made((4,)).params_dtype == torch.float32


@pytest.mark.parametrize(
    ("recompute", "granularity", "modules"),
    [("none", None, None), ("selective", "selective", ["mlp"]), ("full", "full", None)],
)
def test_recompute(recompute: str, granularity: str | None, modules: list[str] | None) -> None:
    config = made((4,), {"recompute": recompute})
    assert config.recompute_granularity == granularity
    if modules:
        assert config.recompute_modules == modules
