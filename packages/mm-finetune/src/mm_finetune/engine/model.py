"""Qwen2.5-VL for megatron-core: the vision tower on the first stages, the language model on those that follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mm_finetune.config import OptimizationConfig, ParallelConfig
from mm_finetune.data import Batch
from mm_finetune.engine.attention import Rows
from mm_finetune.engine.decoder import language_model
from mm_finetune.engine.layers import MultimodalRotary, PackedRow
from mm_finetune.engine.parallel import Ranks, transformer_config
from mm_finetune.engine.pictures import Grid
from mm_finetune.engine.stages import Stages
from mm_finetune.engine.vision import VisionTower
from mm_finetune.errors import ConfigError


class QwenVL(nn.ModuleList):
    """What one process holds of Qwen2.5-VL: a :class:`Chunk`, or with virtual pipeline stages several.

    Args:
        hf_config: transformers' ``Qwen2_5_VLConfig`` or ``Qwen2VLConfig``.
        parallel: parallel sizes.
        train: precision and recomputation; None: float32, none.
        stages: which stage has what.
        ranks: where this process stands.

    Attributes:
        config: Megatron's configuration of the language model.
        adaptation: what :mod:`mm_finetune.engine.lora` remembers of the adapters that it put on; None: there are none.

    Raises:
        ConfigError: the model does not fit the parallel sizes.
    """

    def __init__(
        self,
        hf_config: Any,
        parallel: ParallelConfig,
        train: OptimizationConfig | None,
        stages: Stages,
        ranks: Ranks,
    ) -> None:
        super().__init__()
        self.config = transformer_config(hf_config.text_config, parallel, stages.llm, train)
        self.adaptation: object = None
        if hf_config.tie_word_embeddings and (faults := stages.tied_faults()):
            raise ConfigError("; ".join(faults))
        for number in range(ranks.vpp_size):
            vp_stage = number if ranks.vpp_size > 1 else None
            if vp_stage is not None:
                parallel_state.set_virtual_pipeline_model_parallel_rank(number)
            stage = number * ranks.pp_size + ranks.pp_rank
            tower = None
            if stages.vit[stage]:
                tower = VisionTower(hf_config, parallel, train, stages=stages, stage=stage, vp_stage=vp_stage)
            self.append(Chunk(self.config, hf_config, tower, stages=stages, stage=stage, vp_stage=vp_stage))

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks."""
        return cast(Iterator[Chunk], super().__iter__())


class Chunk(MegatronModule):
    """One pipeline stage, or virtual pipeline stage, of Qwen2.5-VL.

    The names of its weights are those of the checkpoint layout.

    Args:
        config: Megatron's configuration of the language model.
        hf_config: transformers' ``Qwen2_5_VLConfig``.
        tower: the stage's part of the vision tower.
        stages: which stage has what.
        stage: this one.
        vp_stage: which of the process's virtual stages it is; None: there are none.

    Attributes:
        learns_below: something trains on the stages before this one; they want a gradient of what they sent.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Any,
        tower: VisionTower | None,
        *,
        stages: Stages,
        stage: int,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.stage, self.vp_stage, self.learns_below = stage, vp_stage, stage > 0
        self.pre_process = stage == stages.embedding
        self.post_process = stage == len(stages.llm) - 1
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        self.picture_tokens: tuple[int, int] = (hf_config.image_token_id, hf_config.video_token_id)
        self.image_encoder = tower
        text = hf_config.text_config
        self.rotary = MultimodalRotary(
            text.hidden_size // text.num_attention_heads,
            text.rope_parameters["rope_theta"],
            text.rope_parameters["mrope_section"],
        )
        self.received: Tensor | None = None
        self.text_decoder = None
        if stages.llm[stage]:
            self.text_decoder = language_model(
                config,
                hf_config,
                layers=stages.llm[stage],
                pre_process=self.pre_process,
                post_process=self.post_process,
                vp_stage=vp_stage,
            )

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Where Megatron finds the tied weight."""
        return None if self.text_decoder is None else self.text_decoder.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Where Megatron hands over the previous stage's output."""
        self.received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: Batch, *, logits: bool = False, each_token: bool = False, marked: bool = False) -> Tensor:
        """Run the stage.

        Returns:
            The last stage: the sum of all tokens' losses, each times its ``loss_mask``; with `logits`
            ``[batch, tokens, vocabulary / tp]``; with `marked` the same of those positions alone whose ``loss_mask`` is
            not 0, row after row: ``[positions, vocabulary / tp]``; with `each_token` ``[batch, tokens]``, the loss of
            each token whose ``loss_mask`` is not 0, without gradients.
            Other stages: hidden states ``[tokens, batch, hidden]``; with sequence parallelism this rank's tokens.
            Before the language model: what the tower returns, or one number where there are no pictures.
        """
        received, self.received = self.received, None
        grids = _grids(batch) if self.image_encoder is not None or self.pre_process else []
        if self.text_decoder is None:
            nothing = torch.zeros(1, 1, 1, dtype=self.config.params_dtype, device=batch.input_ids.device)
            seen = self._see(batch, grids, received)
            return self._sent(nothing if seen is None else seen, received)
        self.text_decoder.each_token = each_token
        embedded = None
        if self.pre_process:
            words = self.text_decoder.embedding.word_embeddings(batch.input_ids)
            embedded = self._sent(self._embed(batch, words, grids, received), received)
            if self.config.sequence_parallel:
                embedded = scatter_to_sequence_parallel_region(embedded)
        else:
            self.text_decoder.set_input_tensor(received)
        return self.text_decoder(  # type: ignore[no-any-return]
            batch.input_ids,
            batch.position_ids,
            None,
            decoder_input=embedded,
            labels=None if logits or marked else batch.labels,
            loss_mask=None if logits else batch.loss_mask,
            packed_seq_params=PackedRow(
                rows=None if batch.cu_seqlens is None else Rows.packed(batch.cu_seqlens),
                rotary=self.rotary(batch.position_ids),
            ),
        )

    def _see(self, batch: Batch, grids: Sequence[Grid], received: Tensor | None) -> Tensor | None:
        """Hidden states of the tower, or the features of all pictures, then videos; None: there are none."""
        if not grids:
            return None
        x = received
        if x is not None and not self.learns_below:
            x = x.detach()
        if self.image_encoder is None:
            return x
        if x is None:
            pixels = [each for each in (batch.pixel_values, batch.pixel_values_videos) if each is not None]
            x = torch.cat(pixels).to(self.config.params_dtype)
        return self.image_encoder(x, grids)  # type: ignore[no-any-return]

    def _embed(self, batch: Batch, embedded: Tensor, grids: Sequence[Grid], received: Tensor | None) -> Tensor:
        """``[tokens, batch, hidden]``: word embeddings, with picture features where pictures and videos stand."""
        features = self._see(batch, grids, received)
        if features is not None:
            for token, shown in zip(self.picture_tokens, _shown(features[:, 0], grids, batch), strict=True):
                if len(shown):
                    where = (batch.input_ids == token)[..., None].expand_as(embedded)
                    embedded = embedded.masked_scatter(where, shown.to(embedded.dtype))
        return embedded.transpose(0, 1).contiguous()

    def _sent(self, x: Tensor, received: Tensor | None) -> Tensor:
        """With a gradient to come, for itself and for what the stage before sent."""
        if not torch.is_grad_enabled():
            return x
        if received is not None:
            # The stage before waits for it, also where no picture or nothing that trains made use of it.
            return cast(Tensor, _WithGradient.apply(x, received))
        # All of it is frozen. A layer that is computed again, or a stage that is all frozen, would take this for
        # "no gradient is wanted of me", and its own weights would get none, without an error.
        return x if x.requires_grad else x.requires_grad_()


class _WithGradient(torch.autograd.Function):
    """A tensor as it is; another one gets a gradient of zeros, beside what it gets on other ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: Tensor) -> Tensor:
        ctx.received = (received.shape, received.dtype)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.received
        return grad, grad.new_zeros(shape, dtype=dtype)


def _grids(batch: Batch) -> list[Grid]:
    """Of all pictures, then of all videos; waits for the device where there are any."""
    grids = [grid for grid in (batch.image_grid_thw, batch.video_grid_thw) if grid is not None]
    found: list[Grid] = torch.cat(grids).tolist() if grids else []
    return found


def _shown(features: Tensor, grids: Sequence[Grid], batch: Batch) -> tuple[Tensor, Tensor]:
    """What stands in the places of pictures, and of videos; where sequences show the same one, each time."""
    patches = [prod(grid) for grid in grids]
    pieces = features.split([len(features) * count // sum(patches) for count in patches])
    images = 0 if batch.image_grid_thw is None else len(batch.image_grid_thw)
    parts = ((pieces[:images], batch.image_order), (pieces[images:], batch.video_order))
    first, second = ([part[number] for number in order] if order else part for part, order in parts)
    return torch.cat([features[:0], *first]), torch.cat([features[:0], *second])
