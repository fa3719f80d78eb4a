"""Which published weights stand in each of Megatron's, and what tensor parallelism cuts it along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

Cut = Literal["outputs", "inputs"]
QKV, PROJ = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"


@dataclass(frozen=True)
class Fused:
    """One of Megatron's weights.

    Attributes:
        published: the weights that it holds.
        cut: None: it is whole on every tensor-parallel rank.
    """

    published: tuple[str, ...]
    cut: Cut | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The published layers, as adapters name them."""
        return tuple(name.removesuffix(".weight") for name in self.published if name.endswith(".weight"))


Part = Mapping[str, Fused]
"""By Megatron's names, in the order of the layer."""


@cache
def decoder_layer(number: int) -> Part:
    """A layer of the language model."""
    layer, attention, mlp = (f"model.layers.{number}.{part}" for part in ("", "self_attn.", "mlp."))
    qkv = [f"{attention}{name}_proj" for name in "qkv"]
    return {
        "input_layernorm.weight": Fused((f"{layer}input_layernorm.weight",)),
        QKV: Fused(tuple(f"{name}.weight" for name in qkv), "outputs"),
        "self_attention.linear_qkv.bias": Fused(tuple(f"{name}.bias" for name in qkv), "outputs"),
        PROJ: Fused((f"{attention}o_proj.weight",), "inputs"),
        "pre_mlp_layernorm.weight": Fused((f"{layer}post_attention_layernorm.weight",)),
        FC1: Fused((f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), "outputs"),
        FC2: Fused((f"{mlp}down_proj.weight",), "inputs"),
    }


@cache
def vision_layer(number: int, *, gated: bool) -> Part:
    """A layer of the vision tower.

    Args:
        number: of the layer.
        gated: see :class:`mm_finetune.planning.architecture.Vision`.
    """
    block = f"visual.blocks.{number}."
    first, last = (("gate_proj", "up_proj"), "down_proj") if gated else (("fc1",), "fc2")
    return {
        **_norm("input_layernorm", f"{block}norm1", gated=gated),
        **_column("self_attention.linear_qkv", f"{block}attn.qkv"),
        **_row("self_attention.linear_proj", f"{block}attn.proj"),
        **_norm("pre_mlp_layernorm", f"{block}norm2", gated=gated),
        **_column("mlp.linear_fc1", *(f"{block}mlp.{name}" for name in first)),
        **_row("mlp.linear_fc2", f"{block}mlp.{last}"),
    }


PATCH_EMBEDDING: Part = {"patch_embed.proj.weight": Fused(("visual.patch_embed.proj.weight",))}


@cache
def merger(*, gated: bool) -> Part:
    """The merger at the end of the vision tower, which Megatron calls projector."""
    return {
        **_norm("layernorm", "visual.merger.ln_q", gated=gated),
        **_column("encoder.linear_fc1", "visual.merger.mlp.0"),
        **_row("encoder.linear_fc2", "visual.merger.mlp.2"),
    }


def _norm(name: str, published: str, *, gated: bool) -> Part:
    return {f"{name}.{half}": Fused((f"{published}.{half}",)) for half in ("weight", "bias")[: 1 if gated else 2]}


def _column(name: str, *published: str) -> Part:
    return {
        f"{name}.{half}": Fused(tuple(f"{one}.{half}" for one in published), "outputs") for half in ("weight", "bias")
    }


def _row(name: str, published: str) -> Part:
    """Its bias is added to the sum over ranks, so each has all of it."""
    return {f"{name}.weight": Fused((f"{published}.weight",), "inputs"), f"{name}.bias": Fused((f"{published}.bias",))}
