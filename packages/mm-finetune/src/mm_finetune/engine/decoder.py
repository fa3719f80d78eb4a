"""The language model: Megatron's decoder with a loss that never holds all logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from mm_finetune.engine.layers import layer_spec, norm_of
from mm_finetune.engine.loss import linear_cross_entropy, linear_token_losses
from mm_finetune.engine.pointwise import swiglu


class Decoder(GPTModel):
    """Megatron's, with our loss in the place of its logits."""

    each_token = False  # GPTModel.forward passes no word of ours on

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark the weights of both ends. Megatron's would sum their beginnings over stages of its own choice."""
        ends = [self.embedding.word_embeddings.weight] if self.pre_process else []
        if self.post_process and self.output_layer.weight is not None:
            ends.append(self.output_layer.weight)
        for weight in ends:
            weight.is_embedding_or_output_parameter = True
        if not self.share_embeddings_and_output_weights:
            return
        weight = self.shared_embedding_or_output_weight()
        if self.pre_process and self.post_process:
            weight.zero_out_wgrad = True
        else:
            weight.shared_embedding = True
            # One of the two counts in the norm.
            weight.shared = self.post_process

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


def language_model(
    config: TransformerConfig,
    hf_config: Any,
    *,
    layers: int,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> Decoder:
    """The layers of a stage.

    Args:
        config: Megatron's configuration.
        hf_config: transformers' ``Qwen2_5_VLConfig`` or ``Qwen2VLConfig``.
        layers: how many.
        pre_process: the embedding is among them.
        post_process: final norm and output layer are.
        vp_stage: which of the process's virtual stages it is; None: there are none.
    """
    text = hf_config.text_config
    layer = layer_spec(config, swiglu, causal=True)
    made = Decoder(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm_of(config)),
        vocab_size=text.vocab_size,
        max_sequence_length=text.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="none",  # attention has it, from PackedRow
        vp_stage=vp_stage,
    )
    if pre_process:
        # Picture features are put in before anything is scattered.
        made.embedding.word_embeddings.reduce_scatter_embeddings = False
        made.embedding.scatter_to_sequence_parallel = False
    return made
