"""Processes, groups, and megatron-core's configuration with its traps closed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from mm_finetune.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands."""

    world_size: int
    rank: int
    tp_rank: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int

    @property
    def first_stage(self) -> bool:
        """This process embeds tokens and pictures."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """This process computes the loss."""
        return self.pp_rank == self.pp_size - 1


@contextlib.contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started (or be the only one), and leave them at the end.

    Returns:
        The device of this process: an accelerator's, or the CPU.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu")
    if accelerator is not None:
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device.index)
    backend = dist.get_default_backend_for_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def model_parallel(config: ParallelConfig) -> Iterator[Ranks]:
    """Megatron's process groups for a layout; the seeds of its generators are set too."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(config.tp_size, config.pp_size)
    model_parallel_cuda_manual_seed(0)
    try:
        yield Ranks(
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pp_size=config.pp_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )
    finally:
        parallel_state.destroy_model_parallel()


def transformer_config(text: Any, parallel: ParallelConfig, llm_pp_layers: tuple[int, ...]) -> TransformerConfig:
    """Megatron's configuration of the language model.

    Args:
        text: transformers' ``Qwen2_5_VLTextConfig``.
        parallel: parallel sizes.
        llm_pp_layers: language layers of each pipeline stage.
    """
    pipeline = parallel.pp_size > 1
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.hidden_size // text.num_attention_heads,
        add_bias_linear=False,
        add_qkv_bias=True,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        pipeline_model_parallel_layout=_stages(llm_pp_layers) if pipeline else None,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        cuda_graph_scope=[],
        # Without it the shards are not marked as such, and the gradient norm counts rank 0's only.
        perform_initialization=True,
        use_cpu_initialization=True,
        # Micro-batches are as long as their longest sample.
        variable_seq_lengths=pipeline,
        # Megatron asks for this one with variable lengths, even of a model without experts.
        moe_token_dispatcher_type="alltoall",
        # Freed outputs are read by sends that are still under way where there is no stream order.
        deallocate_pipeline_outputs=False,
        **dict.fromkeys(_FUSIONS, False),
    )


# Fused paths that need Apex, Transformer Engine or CUDA.
_FUSIONS = (
    "bias_activation_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion",
    "apply_rope_fusion", "persist_layer_norm",
)  # fmt: skip


def _stages(llm_pp_layers: tuple[int, ...]) -> list[list[str]]:
    stages = [["decoder"] * count for count in llm_pp_layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
