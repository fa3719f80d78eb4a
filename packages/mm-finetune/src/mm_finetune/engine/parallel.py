"""Processes, groups, and megatron-core's configuration with its traps closed."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from mm_finetune.config import OptimizationConfig, ParallelConfig
from mm_finetune.engine.stages import Stages
from mm_finetune.errors import ConfigError, LostProcessError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands."""

    world_size: int
    rank: int
    tp_rank: int
    pp_rank: int
    pp_size: int
    vpp_size: int = 1
    dp_rank: int
    dp_size: int

    @property
    def first_stage(self) -> bool:
        """This process takes in pictures."""
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

    Raises:
        ConfigError: they can't meet.
        LostProcessError: in the middle of the work, another process has ended.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu")
    if accelerator is not None:
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device.index)
    backend = dist.get_default_backend_for_device(device)
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend)
        except dist.DistError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(
                f"the processes could not meet at {where} ({str(error).splitlines()[0]:.200}); if another program has"
                " the port, give torchrun another --master_port"
            ) from error
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # Megatron calls functions of torch.distributed by names that newer versions give up.
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
            yield device
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST):
            said = str(error).splitlines()[0].split(". ")[0]
            raise LostProcessError(
                f"another process of the run has ended, or the network to it ({said:.200}); when the cause is found,"
                " output.resume=true goes on from the last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


# How gloo and hccl say it; nccl has a type of error.
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "HCCL function error")


@contextlib.contextmanager
def model_parallel(config: ParallelConfig, stages: Stages | None = None) -> Iterator[Ranks]:
    """Megatron's process groups for a layout; the seeds of its generators are set too.

    Args:
        config: parallel sizes.
        stages: which stage has what; default: the language model begins on the first.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    first = stages.embedding_rank if stages else 0
    virtual = config.vpp_size if config.vpp_size > 1 else None
    parallel_state.initialize_model_parallel(
        config.tp_size,
        config.pp_size,
        virtual,
        # Those that hold a tied weight, to sum its gradient.
        get_embedding_ranks=lambda ranks, *_: sorted({ranks[first], ranks[-1]}),
    )
    model_parallel_cuda_manual_seed(0)
    try:
        yield Ranks(
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pp_size=config.pp_size,
            vpp_size=config.vpp_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )
    finally:
        parallel_state.destroy_model_parallel()


def transformer_config(
    text: Any, parallel: ParallelConfig, llm_pp_layers: tuple[int, ...], train: OptimizationConfig | None = None
) -> TransformerConfig:
    """Megatron's configuration of the language model.

    Args:
        text: transformers' ``Qwen2_5_VLTextConfig``.
        parallel: parallel sizes.
        llm_pp_layers: language layers of each pipeline stage; of virtual ones, row after row of the layout.
        train: precision and recomputation; default: float32, none.

    Raises:
        ConfigError: the layers don't fit the stages, or the heads the tensor-parallel size.
    """
    _check_sizes(text, parallel, llm_pp_layers)
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
        mrope_section=list(text.rope_parameters["mrope_section"]),
        tensor_model_parallel_size=parallel.tp_size,
        # A sequence of one rank is whole; Megatron refuses to call that sequence parallel.
        sequence_parallel=parallel.sequence_parallel and parallel.tp_size > 1,
        **_RECOMPUTE[train.recompute if train else "none"],
        **common_settings(parallel, llm_pp_layers, train),
    )


def common_settings(
    parallel: ParallelConfig, layers: tuple[int, ...], train: OptimizationConfig | None
) -> dict[str, Any]:
    """What Megatron is told of either part of the model.

    Args:
        parallel: parallel sizes.
        layers: of each pipeline stage.
        train: precision; default: float32.
    """
    pipeline = parallel.pp_size > 1
    dtype = torch.bfloat16 if train and train.dtype == "bf16" else torch.float32
    return {
        # Megatron's word for: the layer specification has it, and the gate is in it.
        "use_te_activation_func": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "pipeline_model_parallel_size": parallel.pp_size,
        "pipeline_model_parallel_layout": _stages(layers) if pipeline else None,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # The optimizer step divides by the tokens of the whole global batch; Megatron then only sums.
        "calculate_per_token_loss": True,
        "cuda_graph_scope": [],
        # Without it the shards are not marked as such, and the gradient norm counts rank 0's only.
        "perform_initialization": True,
        "use_cpu_initialization": True,
        # Micro-batches are as long as their longest sample.
        "variable_seq_lengths": pipeline,
        # Megatron asks for this one with variable lengths, even of a model without experts.
        "moe_token_dispatcher_type": "alltoall",
        # Freed outputs are read by sends that are still under way where there is no stream order.
        "deallocate_pipeline_outputs": False,
        **(_INTERLEAVED if parallel.vpp_size > 1 else {}),
        **dict.fromkeys(_FUSIONS, False),
    }


# With two stages both neighbours are the same process, and batched sends and receives would pair up wrongly,
# without an error.
_INTERLEAVED: dict[str, Any] = {"overlap_p2p_comm": True, "batch_p2p_comm": False}

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}

# Fused paths that need Apex, Transformer Engine or CUDA.
_FUSIONS = (
    "bias_activation_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion",
    "apply_rope_fusion", "persist_layer_norm",
)  # fmt: skip


def _check_sizes(text: Any, parallel: ParallelConfig, llm_pp_layers: tuple[int, ...]) -> None:
    stages, layers = parallel.pp_size * parallel.vpp_size, text.num_hidden_layers
    faults = []
    if len(llm_pp_layers) != stages or sum(llm_pp_layers) != layers:
        faults.append(
            f"the layers {list(llm_pp_layers)} must be one number for each of the {stages} stages (pp_size"
            f" {parallel.pp_size} x vpp_size {parallel.vpp_size}), {layers} in all"
        )
    if parallel.vpp_size > 1 and parallel.pp_size == 1:
        faults.append(f"parallel.vpp_size is {parallel.vpp_size}; it needs parallel.pp_size of 2 or more")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(text, name) % parallel.tp_size:
            faults.append(f"parallel.tp_size {parallel.tp_size} does not divide {name} {getattr(text, name)}")
    if faults:
        raise ConfigError("; ".join(faults))


def _stages(layers: tuple[int, ...]) -> list[list[str]]:
    """For Megatron, to which any layer is a decoder's; before the first one it wants to hear of an embedding."""
    stages = [["decoder"] * count for count in layers]
    next(stage for stage in stages if stage).insert(0, "embedding")
    stages[-1].append("loss")
    return stages
