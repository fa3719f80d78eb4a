"""The vision tower of Megatron's layers: cut over tensor-parallel ranks, dealt out over the first pipeline stages.

Its parts have the names of mm-convert's layout. Each layer takes the patches of a micro-batch as one row, and attends
within pictures or windows.

Shape suffixes: T patches of all pictures, M squares of patches that become a token each, C width of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from mm_finetune.config import OptimizationConfig, ParallelConfig
from mm_finetune.engine.adapters import AdaptableColumn, AdaptableRow
from mm_finetune.engine.layers import PackedRow, layer_spec, norm_of
from mm_finetune.engine.parallel import common_settings
from mm_finetune.engine.pictures import Geometry, Grid, geometry
from mm_finetune.engine.pointwise import quick_gelu, swiglu
from mm_finetune.engine.stages import Stages


class VisionTower(MegatronModule):
    """What one stage has of the tower.

    Args:
        hf_config: transformers' ``Qwen2_5_VLConfig`` or ``Qwen2VLConfig``.
        parallel: parallel sizes.
        train: precision and recomputation.
        stages: which stage has what.
        stage: this one.
        vp_stage: which of the process's virtual stages it is; None: there are none.
    """

    def __init__(
        self,
        hf_config: Any,
        parallel: ParallelConfig,
        train: OptimizationConfig | None,
        *,
        stages: Stages,
        stage: int,
        vp_stage: int | None,
    ) -> None:
        vision = hf_config.vision_config
        config = vision_settings(vision, parallel, train, stages)
        super().__init__(config)
        alone = stages.vit_tp_size < parallel.tp_size
        groups = _groups(alone=alone)
        self.vision = vision
        self.encoder = _Encoder(
            config, vision, groups, first=stage == 0, layers=stages.vit[stage], vp_stage=vp_stage,
            recompute=train is not None and train.recompute == "full",
        )  # fmt: skip
        self.projector = _Merger(config, hf_config, groups) if stage == stages.merger else None
        if alone:
            _mark_whole(self)

    def geometry(self, grids: Sequence[Grid], device: torch.device) -> Geometry:
        """Where the patches of pictures lie."""
        vision = self.vision
        # Qwen2-VL has no windows.
        window = getattr(vision, "window_size", 0) // vision.spatial_merge_size // vision.patch_size
        rope = getattr(vision, "rope_parameters", None) or {}
        return geometry(
            grids,
            merge=vision.spatial_merge_size,
            window=window,
            head_dim=self.config.kv_channels,
            theta=rope.get("rope_theta", 10000.0),
            device=device,
        )

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Run the stage's part.

        Args:
            x: the first stage: pixels ``[T, channels * time * height * width]``; others: what the one before returned.
            grids: of the pictures.

        Returns:
            Hidden states ``[T, 1, C]`` in the tower's order; the last stage: features ``[M, 1, hidden]``, picture after
            picture.
        """
        places = self.geometry(grids, x.device)
        hidden = self.encoder(x, places)
        return hidden if self.projector is None else places.restored(self.projector(hidden))


class _Encoder(MegatronModule):
    def __init__(
        self,
        config: TransformerConfig,
        vision: Any,
        groups: ProcessGroupCollection,
        *,
        first: bool,
        layers: int,
        vp_stage: int | None,
        recompute: bool,
    ) -> None:
        super().__init__(config)
        self.patch_embed = PatchEmbedding(config, vision) if first else None
        self.merge = vision.spatial_merge_size
        layer = layer_spec(config, swiglu if config.gated_linear_unit else quick_gelu, causal=False)
        self.blocks = Blocks(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * layers),
            post_layer_norm=False,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self.blocks.recompute = recompute
        self.blocks.whole = frozenset(getattr(vision, "fullatt_block_indexes", range(vision.depth)))

    def forward(self, x: Tensor, places: Geometry) -> Tensor:
        if self.patch_embed is not None:
            x = places.ordered(self.patch_embed(x), self.merge)[:, None]
        return cast(Tensor, self.blocks(x, places))


class Blocks(TransformerBlock):
    """The layers of a stage.

    Attributes:
        recompute: compute each layer once more in the backward pass.
        whole: numbers of the layers that see whole frames; the others see windows.
    """

    recompute = False
    whole: frozenset[int] = frozenset()

    def forward(self, hidden_T1C: Tensor, places: Geometry) -> Tensor:
        """``[T, 1, C]`` to the same."""
        frames = PackedRow(rows=places.frames, rotary=places.rotary)
        windows = PackedRow(rows=places.windows, rotary=places.rotary)
        again = self.recompute and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            told = frames if layer.layer_number - 1 in self.whole else windows
            if again:
                # Not Megatron's: that one has layers below everything that trains run backwards, or gives the lowest
                # layer that does no gradient.
                hidden_T1C, _ = checkpoint(layer, hidden_T1C, packed_seq_params=told, use_reentrant=False)
            else:
                hidden_T1C, _ = layer(hidden_T1C, packed_seq_params=told)
        return hidden_T1C


class PatchEmbedding(nn.Module):
    """A convolution whose steps are as long as its kernel, as the matrix product that it is: ten times faster on a CPU.

    Args:
        config: Megatron's.
        vision: transformers' configuration of the tower.
    """

    def __init__(self, config: TransformerConfig, vision: Any) -> None:
        super().__init__()
        kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        # No convolution module: torch_npu would give its weight the layout of convolutions.
        self.proj = nn.Module()
        weight = torch.empty(config.hidden_size, *kernel, dtype=config.params_dtype)
        self.proj.register_parameter("weight", nn.Parameter(config.init_method(weight)))

    def forward(self, pixels: Tensor) -> Tensor:
        """``[T, channels * time * height * width]`` to ``[T, C]``."""
        weight = cast(Tensor, self.proj.weight)
        return linear(pixels.to(weight.dtype), weight.flatten(1))


class _Merger(MegatronModule):
    """A square of patches to a token of the language model."""

    def __init__(self, config: TransformerConfig, hf_config: Any, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.wide = config.hidden_size * hf_config.vision_config.spatial_merge_size**2
        self.layernorm = norm_of(config)(config, config.hidden_size, eps=config.layernorm_epsilon)
        settings = copy(config)
        settings.hidden_size, settings.ffn_hidden_size = hf_config.text_config.hidden_size, self.wide
        settings.gated_linear_unit = False
        self.encoder = MLP(
            settings,
            MLPSubmodules(linear_fc1=AdaptableColumn, linear_fc2=AdaptableRow, activation_func=_gelu),
            input_size=self.wide,
            ffn_hidden_size=self.wide,
            tp_group=groups.tp,
        )

    def forward(self, hidden_T1C: Tensor) -> Tensor:
        """``[M, 1, hidden]``."""
        out, bias = self.encoder(self.layernorm(hidden_T1C).view(-1, 1, self.wide))
        merged: Tensor = out + bias
        return merged


def vision_settings(
    vision: Any, parallel: ParallelConfig, train: OptimizationConfig | None, stages: Stages
) -> TransformerConfig:
    """Megatron's configuration of the tower.

    Args:
        vision: transformers' ``Qwen2_5_VLVisionConfig`` or ``Qwen2VLVisionConfig``.
        parallel: parallel sizes.
        train: precision.
        stages: which stage has what.
    """
    gated = hasattr(vision, "intermediate_size")
    # Qwen2-VL calls the width embed_dim: hidden_size is the language model's.
    width = vision.hidden_size if gated else vision.embed_dim
    return TransformerConfig(
        num_layers=vision.depth,
        hidden_size=width,
        ffn_hidden_size=vision.intermediate_size if gated else int(width * vision.mlp_ratio),
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        kv_channels=width // vision.num_heads,
        normalization="RMSNorm" if gated else "LayerNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=gated,
        tensor_model_parallel_size=stages.vit_tp_size,
        **common_settings(parallel, stages.vit, train),
    )


def _gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x)


def _groups(*, alone: bool) -> ProcessGroupCollection:
    """Megatron's; where each rank has the whole tower, its tensor-parallel group is itself."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if alone:
        groups.tp = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return groups


def _mark_whole(tower: nn.Module) -> None:
    """Tensor-parallel ranks have the same weights: one of them counts in the gradient's norm, and writes them."""
    for parameter in tower.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.whole = True  # type: ignore[attr-defined]
