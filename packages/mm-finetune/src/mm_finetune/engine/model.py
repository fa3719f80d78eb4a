"""Qwen2.5-VL for megatron-core: transformers' vision tower on the first stage, Megatron's decoder over all."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mm_finetune.data import Batch
from mm_finetune.engine.layers import CoreAttention, RMSNorm
from mm_finetune.engine.parallel import Ranks


class QwenVL(MegatronModule):
    """One pipeline stage of Qwen2.5-VL.

    The names under ``text_decoder`` are those of the checkpoint layout; ``visual`` holds the
    Hugging Face tower, whole on every tensor-parallel rank of the first stage.

    Args:
        config: Megatron's configuration.
        hf_config: transformers' ``Qwen2_5_VLConfig``.
        ranks: where this process stands.
    """

    def __init__(self, config: TransformerConfig, hf_config: Any, ranks: Ranks) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = ranks.first_stage, ranks.last_stage
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        self.image_token_id: int = hf_config.image_token_id
        self.visual = vision_tower(hf_config) if self.pre_process else None
        self.text_decoder = _decoder(config, hf_config, ranks)
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

    def forward(self, batch: Batch, *, logits: bool = False) -> Tensor:
        """Run the stage.

        Returns:
            The last stage: loss of each token ``[batch, tokens]``, or with `logits`
            ``[batch, tokens, vocabulary / tp]``.
            Other stages: hidden states ``[tokens, batch, hidden]``.
        """
        embedded = self._embed(batch) if self.pre_process else None
        labels = None if logits else batch.labels
        return self.text_decoder(  # type: ignore[no-any-return]
            batch.input_ids, batch.position_ids, None, decoder_input=embedded, labels=labels
        )

    def _embed(self, batch: Batch) -> Tensor:
        """``[tokens, batch, hidden]``: word embeddings, with picture features where pictures stand."""
        embedded: Tensor = self.text_decoder.embedding.word_embeddings(batch.input_ids)
        if batch.pixel_values is not None and self.visual is not None:
            features = self.visual(batch.pixel_values, grid_thw=batch.image_grid_thw).pooler_output
            where = (batch.input_ids == self.image_token_id)[..., None].expand_as(embedded)
            embedded = embedded.masked_scatter(where, features.to(embedded.dtype))
        return embedded.transpose(0, 1).contiguous()


def vision_tower(hf_config: Any) -> nn.Module:
    """The vision transformer and its merger, by transformers."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(hf_config.vision_config, dtype=torch.float32)
    return tower  # type: ignore[no-any-return]


def _decoder(config: TransformerConfig, hf_config: Any, ranks: Ranks) -> GPTModel:
    text = hf_config.text_config
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    layers = TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
    return GPTModel(
        config,
        layers,
        vocab_size=text.vocab_size,
        max_sequence_length=text.max_position_embeddings,
        pre_process=ranks.first_stage,
        post_process=ranks.last_stage,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="mrope",
        rotary_base=int(text.rope_parameters["rope_theta"]),
    )
