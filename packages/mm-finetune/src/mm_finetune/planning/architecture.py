"""The sizes of a model and the names and shapes of its published weights, from config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from mm_finetune.errors import ConfigError
from mm_finetune.families import family_of

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Vision:
    """The vision tower.

    Attributes:
        width: hidden size.
        inner: width of its MLP.
        gated: the MLP has a gate (Qwen2.5-VL), and norms are root mean square norms in float32; else (Qwen2-VL) it is
            plain and norms are layer norms with a bias.
        kernel: a patch: channels, moments, height, width.
        merge: side of the square of patches that becomes a token.
    """

    depth: int
    width: int
    heads: int
    inner: int
    gated: bool
    kernel: tuple[int, int, int, int]
    merge: int

    @property
    def patch(self) -> int:
        """Numbers in a patch."""
        return prod(self.kernel)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Qwen2.5-VL or Qwen2-VL of any size.

    Attributes:
        ffn: inner width of the MLP.
        tied: the output layer's weight is the embedding's.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    tied: bool
    vision: Vision

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @classmethod
    def read(cls, hf_dir: Path) -> Architecture:
        """From a Hugging Face folder; the published flat form of config.json and the nested one of transformers 5.

        Raises:
            ConfigError: there is no config.json, it is no model that is trained here, or a size is missing.
        """
        path = hf_dir / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}; is model.hf_dir right?") from error
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error
        try:
            return cls.of(config)
        except KeyError as error:
            raise ConfigError(f"{path} has no {error.args[0]!r}") from error

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Architecture:
        """From the content of config.json.

        Raises:
            ConfigError: it is no model that is trained here.
            KeyError: a size is missing.
        """
        family_of(config.get("model_type"))
        text = {**config, **(config.get("text_config") or {})}
        tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        return cls(
            model_type=config["model_type"],
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            ffn=text["intermediate_size"],
            vocabulary=text["vocab_size"],
            tied=tied,
            vision=_vision(config["vision_config"], gated=config["model_type"] == "qwen2_5_vl"),
        )

    def shapes(self) -> Shapes:
        """Every weight under its published name, as in the safetensors files."""
        return _shapes(self)


@lru_cache
def _shapes(model: Architecture) -> Shapes:
    layer = _layer_shapes(model)
    return {
        **_tower_shapes(model.vision, model.hidden),
        "model.embed_tokens.weight": (model.vocabulary, model.hidden),
        **{f"model.layers.{number}.{name}": shape for number in range(model.layers) for name, shape in layer.items()},
        "model.norm.weight": (model.hidden,),
        **({} if model.tied else {"lm_head.weight": (model.vocabulary, model.hidden)}),
    }


def _layer_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    hidden, queries, keys = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return {
        "input_layernorm.weight": (hidden,),
        **{f"self_attn.{name}.weight": (width, hidden) for name, width in widths.items()},
        **{f"self_attn.{name}.bias": (width,) for name, width in widths.items()},
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (model.ffn, hidden),
        "mlp.up_proj.weight": (model.ffn, hidden),
        "mlp.down_proj.weight": (hidden, model.ffn),
    }


def _vision(vision: Mapping[str, Any], *, gated: bool) -> Vision:
    # Qwen2-VL calls the width embed_dim; transformers' classes hold these defaults, published files leave some out.
    width = vision.get("hidden_size", 1280) if gated else vision.get("embed_dim", 1280)
    patch, frames = vision.get("patch_size", 14), vision.get("temporal_patch_size", 2)
    return Vision(
        depth=vision["depth"],
        width=width,
        heads=vision.get("num_heads", 16),
        inner=vision["intermediate_size"] if gated else int(width * vision.get("mlp_ratio", 4)),
        gated=gated,
        kernel=(3, frames, patch, patch),
        merge=vision.get("spatial_merge_size", 2),
    )


def _tower_shapes(vision: Vision, hidden: int) -> dict[str, tuple[int, ...]]:
    width, wide = vision.width, vision.width * vision.merge**2
    matrices = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    if vision.gated:
        matrices |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (vision.inner, width))
        matrices |= {"mlp.down_proj": (width, vision.inner)}
    else:
        matrices |= {"mlp.fc1": (vision.inner, width), "mlp.fc2": (width, vision.inner)}
    norm_halves = ("weight",) if vision.gated else ("weight", "bias")
    norms = [f"{norm}.{half}" for norm in ("norm1", "norm2") for half in norm_halves]
    block: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (width,))
    for name, (outputs, inputs) in matrices.items():
        block |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return {
        "visual.patch_embed.proj.weight": (width, *vision.kernel),
        **{f"visual.blocks.{number}.{name}": shape for number in range(vision.depth) for name, shape in block.items()},
        **{f"visual.merger.ln_q.{half}": (width,) for half in norm_halves},
        "visual.merger.mlp.0.weight": (wide, wide),
        "visual.merger.mlp.0.bias": (wide,),
        "visual.merger.mlp.2.weight": (hidden, wide),
        "visual.merger.mlp.2.bias": (hidden,),
    }
