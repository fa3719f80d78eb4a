"""Qwen2.5-VL for megatron-core: transformers' vision tower on the first stage, Megatron's decoder over all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import linear

from mm_finetune.data import Batch
from mm_finetune.engine.adapters import AdaptableColumn, AdaptableRow
from mm_finetune.engine.attention import Rows
from mm_finetune.engine.layers import CoreAttention, MultimodalRotary, PackedRow, RMSNorm
from mm_finetune.engine.loss import linear_cross_entropy, linear_token_losses
from mm_finetune.engine.parallel import Ranks
from mm_finetune.engine.pointwise import swiglu
from mm_finetune.engine.vision import vision_tower


class QwenVL(nn.ModuleList):
    """What one process holds of Qwen2.5-VL: a :class:`Chunk`, or with virtual pipeline stages several.

    Args:
        config: Megatron's configuration.
        hf_config: transformers' ``Qwen2_5_VLConfig``.
        ranks: where this process stands.

    Attributes:
        adaptation: what :mod:`mm_finetune.engine.lora` remembers of the adapters that it put on; None: there are none.
    """

    def __init__(self, config: TransformerConfig, hf_config: Any, ranks: Ranks) -> None:
        super().__init__()
        self.config = config
        self.adaptation: object = None
        for number in range(ranks.vpp_size):
            if ranks.vpp_size > 1:
                parallel_state.set_virtual_pipeline_model_parallel_rank(number)
            self.append(Chunk(config, hf_config, ranks, number))

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks."""
        return cast(Iterator[Chunk], super().__iter__())


class Chunk(MegatronModule):
    """One pipeline stage, or virtual pipeline stage, of Qwen2.5-VL.

    The names under ``text_decoder`` are those of the checkpoint layout; ``visual`` holds the
    Hugging Face tower, whole on every tensor-parallel rank of the first stage.

    Args:
        config: Megatron's configuration.
        hf_config: transformers' ``Qwen2_5_VLConfig``.
        ranks: where this process stands.
        number: which of the process's virtual stages.
    """

    def __init__(self, config: TransformerConfig, hf_config: Any, ranks: Ranks, number: int) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = ranks.first_stage and number == 0
        self.post_process = ranks.last_stage and number == ranks.vpp_size - 1
        self.vp_stage = number if ranks.vpp_size > 1 else None
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        self.picture_tokens: tuple[int, int] = (hf_config.image_token_id, hf_config.video_token_id)
        self.visual = vision_tower(hf_config, config) if self.pre_process else None
        text = hf_config.text_config
        self.rotary = MultimodalRotary(
            text.hidden_size // text.num_attention_heads,
            text.rope_parameters["rope_theta"],
            text.rope_parameters["mrope_section"],
        )
        self.text_decoder = _decoder(config, hf_config, self)
        if self.pre_process:
            # Picture features are put in before anything is scattered.
            embedding = self.text_decoder.embedding
            embedding.word_embeddings.reduce_scatter_embeddings = False
            embedding.scatter_to_sequence_parallel = False

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Where Megatron finds the tied weight."""
        return self.text_decoder.shared_embedding_or_output_weight()  # type: ignore[no-any-return]

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Where Megatron hands over the previous stage's output."""
        self.text_decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: Batch, *, logits: bool = False, each_token: bool = False, marked: bool = False) -> Tensor:
        """Run the stage.

        Returns:
            The last stage: the sum of all tokens' losses, each times its ``loss_mask``; with `logits`
            ``[batch, tokens, vocabulary / tp]``; with `marked` the same of those positions alone whose ``loss_mask`` is
            not 0, row after row: ``[positions, vocabulary / tp]``; with `each_token` ``[batch, tokens]``, the loss of
            each token whose ``loss_mask`` is not 0, without gradients.
            Other stages: hidden states ``[tokens, batch, hidden]``; with sequence parallelism this rank's tokens.
        """
        self.text_decoder.each_token = each_token
        return self.text_decoder(  # type: ignore[no-any-return]
            batch.input_ids,
            batch.position_ids,
            None,
            decoder_input=self._embed(batch) if self.pre_process else None,
            labels=None if logits or marked else batch.labels,
            loss_mask=None if logits else batch.loss_mask,
            packed_seq_params=PackedRow(
                rows=None if batch.cu_seqlens is None else Rows.packed(batch.cu_seqlens),
                rotary=self.rotary(batch.position_ids),
            ),
        )

    def _embed(self, batch: Batch) -> Tensor:
        """``[tokens, batch, hidden]``: word embeddings, with picture features where pictures and videos stand."""
        embedded: Tensor = self.text_decoder.embedding.word_embeddings(batch.input_ids)
        pictures = (batch.pixel_values, batch.image_grid_thw)
        videos = (batch.pixel_values_videos, batch.video_grid_thw)
        for (pixels, grid_thw), token in zip((pictures, videos), self.picture_tokens, strict=True):
            if pixels is not None and self.visual is not None:
                features = self.visual(pixels.to(embedded.dtype), grid_thw=grid_thw).pooler_output
                where = (batch.input_ids == token)[..., None].expand_as(embedded)
                embedded = embedded.masked_scatter(where, features.to(embedded.dtype))
        embedded = embedded.transpose(0, 1).contiguous()
        if torch.is_grad_enabled() and not embedded.requires_grad:
            # All of it is frozen. A layer that is computed again, or a stage that is all frozen, would take this for
            # "no gradient is wanted of me", and its own weights would get none, without an error.
            embedded.requires_grad_()
        if self.config.sequence_parallel:
            embedded = scatter_to_sequence_parallel_region(embedded)
        return embedded


class Decoder(GPTModel):
    """Megatron's decoder with a loss that never holds all logits."""

    each_token = False  # GPTModel.forward passes no word of ours on

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None, loss_mask: Tensor | None, **rest: Any
    ) -> Tensor:
        if self.post_process and labels is None and loss_mask is not None:
            return self._logits_at(hidden_states, *loss_mask.nonzero(as_tuple=True))
        if not self.post_process or labels is None:
            return super()._postprocess(  # type: ignore[no-any-return]
                hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **rest
            )
        assert loss_mask is not None, "labels come with a loss mask"
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
        tied = self.share_embeddings_and_output_weights
        weights_N = loss_mask.t().flatten()
        at_N = weights_N.nonzero()[:, 0]
        hidden_NH, labels_N = hidden_states.flatten(0, 1)[at_N], labels.t().flatten()[at_N]
        weight_VH = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = self.pg_collection.tp
        if self.each_token:
            losses_N = torch.zeros_like(weights_N)
            losses_N[at_N] = linear_token_losses(hidden_NH, weight_VH, labels_N, group=group)
            return losses_N.view_as(loss_mask.t()).t().contiguous()
        return linear_cross_entropy(hidden_NH, weight_VH, labels_N, weights_N[at_N], group=group)

    def _logits_at(self, hidden_states_SBH: Tensor, row_N: Tensor, place_N: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            hidden_states_SBH = gather_from_sequence_parallel_region(hidden_states_SBH)
        tied = self.share_embeddings_and_output_weights
        weight_VH = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return linear(hidden_states_SBH[place_N, row_N], weight_VH)


def _decoder(config: TransformerConfig, hf_config: Any, chunk: Chunk) -> Decoder:
    text = hf_config.text_config
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    attention.core_attention = CoreAttention
    mlp.activation_func = swiglu
    attention.linear_qkv = mlp.linear_fc1 = AdaptableColumn
    attention.linear_proj = mlp.linear_fc2 = AdaptableRow
    count = get_num_layers_to_build(config, chunk.vp_stage)
    return Decoder(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm),
        vocab_size=text.vocab_size,
        max_sequence_length=text.max_position_embeddings,
        pre_process=chunk.pre_process,
        post_process=chunk.post_process,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="none",  # attention has it, from PackedRow
        vp_stage=chunk.vp_stage,
    )
