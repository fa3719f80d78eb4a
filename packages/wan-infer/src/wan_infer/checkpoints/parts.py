"""The module of each part without its values, and how its parameters are called on disk.

Modules are built on the meta device, so a 14B model costs nothing until tensors are assigned to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from wan_infer.checkpoints.layout import Part, Source
from wan_infer.checkpoints.metadata import READERS, ClipConfig, Stored, TextEncoderConfig
from wan_infer.checkpoints.names import CLIP, TRANSFORMER, UMT5, UMT5_ALIAS, Layout, NameMap, vae_names
from wan_infer.checkpoints.tensors import Tensors, check, translate
from wan_infer.config import TransformerConfig, VaeConfig

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Blank:
    """A part of a model before its values are read.

    Attributes:
        module: on the meta device.
        config: its shape.
        layout: by which names its parameters go.
        names: to the other layout.
    """

    module: nn.Module
    config: Any
    layout: Layout
    names: NameMap

    def expected(self, layout: Layout) -> Mapping[str, Tensor]:
        """Return the tensors that a file of `layout` has to hold, on the meta device."""
        meta = {name: value for name, value in self.module.named_parameters() if name != UMT5_ALIAS[0]}
        if layout == self.layout:
            return meta
        own = Tensors(place=Path(), meta=meta, read=meta.__getitem__)
        return translate(own, self.names, layout).meta


def open_part(source: Source) -> tuple[Blank, Tensors]:
    """Return the empty module of a part and its stored tensors, checked against it.

    Raises:
        CheckpointError: files are damaged, the configuration is of another model, or tensors are missing, unexpected or
            of another shape; all are named.
    """
    tensors = source.tensors()
    stored = Stored(tensors.place, source.layout, source.config(), tensors.meta)
    blank = _BLANKS[source.part](READERS[source.part](stored))
    check(tensors, blank.expected(source.layout))
    return blank, tensors


def _transformer(config: TransformerConfig) -> Blank:
    from wan_infer.transformer import WanTransformer

    with META:
        module = WanTransformer(config)
    return Blank(module=module, config=config, layout="original", names=TRANSFORMER)


def _vae(config: VaeConfig) -> Blank:
    from wan_infer.vae import WanVae

    with META:
        module = WanVae(config)
    names = vae_names(len(config.dim_mult), config.num_res_blocks)
    return Blank(module=module, config=config, layout="original", names=names)


def _text_encoder(config: TextEncoderConfig) -> Blank:
    from transformers import UMT5Config, UMT5EncoderModel

    values = UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.attention_dim // config.num_heads,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.eps,
        feed_forward_proj="gated-gelu",
    )
    with META:
        module = UMT5EncoderModel(values)
    return Blank(module=module, config=config, layout="diffusers", names=UMT5)


def _clip(config: ClipConfig) -> Blank:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    values = CLIPVisionConfig(
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        projection_dim=config.projection_dim or config.dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=config.activation,
        layer_norm_eps=config.eps,
    )
    with META:
        module = CLIPVisionModelWithProjection(values)
    if config.projection_dim is None:
        del module.visual_projection
    return Blank(module=module, config=config, layout="diffusers", names=CLIP)


_BLANKS: Mapping[Part, Callable[[Any], Blank]] = MappingProxyType(
    {"transformer": _transformer, "vae": _vae, "text_encoder": _text_encoder, "clip": _clip}
)
