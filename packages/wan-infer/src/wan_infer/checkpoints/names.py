"""What each tensor is called in the original Wan2.1 checkpoints and in the diffusers ones: one declared table a part.

A table is a list of rules. In a name, ``#`` stands for a number and a final ``*`` for the last word (weight, bias).
Every name of a part is met by exactly one rule, in either direction; the tests prove it against diffusers itself.
Only CLIP needs more than another name: the original keeps query, key and value in one tensor and other dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["original", "diffusers"]
_Table = tuple[tuple[str, str], ...]
Relation = Literal["same", "rows", "transposed", "unit dimensions"]


@dataclass(frozen=True)
class Rule:
    """One tensor of the original layout, and what it is in the diffusers layout.

    Attributes:
        original: its name there.
        diffusers: its name here; several names when it is cut into equal parts along its rows.
        relation: how the values are related. With "unit dimensions" the original has leading dimensions of size 1.
        dims: dimensions in the diffusers layout, where the original has three ("unit dimensions" only).
    """

    original: str
    diffusers: tuple[str, ...]
    relation: Relation = "same"
    dims: int = 3

    @cached_property
    def original_pattern(self) -> re.Pattern[str]:
        """What matches the original names."""
        return _pattern(self.original)

    @cached_property
    def diffusers_patterns(self) -> tuple[re.Pattern[str], ...]:
        """What matches the diffusers names."""
        return tuple(_pattern(name) for name in self.diffusers)

    def cut(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of the diffusers layout that an original one becomes."""
        if self.relation == "transposed":
            return [tensor.T.contiguous()]
        if self.relation == "unit dimensions":
            return [tensor.reshape(tensor.shape[tensor.ndim - self.dims :])]
        return list(tensor.chunk(len(self.diffusers)))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the original tensor, the inverse of `cut`."""
        if self.relation == "transposed":
            return tensors[0].T.contiguous()
        if self.relation == "unit dimensions":
            return tensors[0].reshape((1,) * (3 - self.dims) + tensors[0].shape)
        return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


@dataclass(frozen=True)
class Step:
    """How one tensor of the wanted layout is made.

    Attributes:
        target: its name.
        sources: the names of the other layout that it is made of.
        rule: the relation of the two.
        piece: which part of the cut tensor it is, or None when it is joined.
    """

    target: str
    sources: tuple[str, ...]
    rule: Rule
    piece: int | None

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        """Make it from the tensors of `sources`; on the meta device, this makes the shape."""
        return self.rule.join(tensors) if self.piece is None else self.rule.cut(tensors[0])[self.piece]


class NameMap:
    """The rules of one part of the model, in both directions."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)

    def to_diffusers(self, name: str) -> tuple[str, ...]:
        """Return what the original tensor `name` is called in the diffusers layout.

        Raises:
            KeyError: no rule meets this name.
        """
        rule, match = self._find_original(name)
        return tuple(_fill(target, match) for target in rule.diffusers)

    def to_original(self, name: str) -> str:
        """Return in which original tensor the diffusers tensor `name` is found.

        Raises:
            KeyError: no rule meets this name.
        """
        rule, match, _ = self._find_diffusers(name)
        return _fill(rule.original, match)

    def steps(self, names: Iterable[str], to: Layout) -> tuple[list[Step], list[str]]:
        """Plan the tensors of the layout `to` from `names` of the other one.

        Returns:
            The steps, and those of `names` that no rule meets. A joined tensor is planned as soon as one of its parts
            is named; `sources` then says what else is needed.
        """
        steps: dict[str, Step] = {}
        unknown = []
        for name in names:
            try:
                for step in self._cuts(name) if to == "diffusers" else [self._join(name)]:
                    steps[step.target] = step
            except KeyError:
                unknown.append(name)
        return list(steps.values()), unknown

    def _cuts(self, name: str) -> list[Step]:
        rule, match = self._find_original(name)
        return [Step(_fill(target, match), (name,), rule, piece) for piece, target in enumerate(rule.diffusers)]

    def _join(self, name: str) -> Step:
        rule, match, _ = self._find_diffusers(name)
        return Step(_fill(rule.original, match), tuple(_fill(part, match) for part in rule.diffusers), rule, None)

    def _find_original(self, name: str) -> tuple[Rule, re.Match[str]]:
        for rule in self.rules:
            if match := rule.original_pattern.fullmatch(name):
                return rule, match
        raise KeyError(name)

    def _find_diffusers(self, name: str) -> tuple[Rule, re.Match[str], int]:
        for rule in self.rules:
            for piece, pattern in enumerate(rule.diffusers_patterns):
                if match := pattern.fullmatch(name):
                    return rule, match, piece
        raise KeyError(name)


def _pattern(template: str) -> re.Pattern[str]:
    words = {r"\#": r"(0|[1-9]\d*)", r"\*": r"(weight|bias)"}
    return re.compile(re.sub(r"\\[#*]", lambda found: words[found[0]], re.escape(template)))


def _fill(template: str, match: re.Match[str]) -> str:
    values = iter(match.groups())
    return re.sub(r"[#*]", lambda _: next(values), template)


def _same_values(*tables: Iterable[tuple[str, str]]) -> NameMap:
    return NameMap(Rule(original, (diffusers,)) for table in tables for original, diffusers in table)


# Transformer: t2v, i2v, flf2v and vace. What a model lacks, it does not name.
_ATTENTION = (
    ("q.*", "to_q.*"),
    ("k.*", "to_k.*"),
    ("v.*", "to_v.*"),
    ("o.*", "to_out.0.*"),
    ("norm_q.weight", "norm_q.weight"),
    ("norm_k.weight", "norm_k.weight"),
)
_BLOCK = (
    ("modulation", "scale_shift_table"),
    *((f"self_attn.{a}", f"attn1.{b}") for a, b in _ATTENTION),
    *((f"cross_attn.{a}", f"attn2.{b}") for a, b in _ATTENTION),
    ("cross_attn.k_img.*", "attn2.add_k_proj.*"),
    ("cross_attn.v_img.*", "attn2.add_v_proj.*"),
    ("cross_attn.norm_k_img.weight", "attn2.norm_added_k.weight"),
    ("norm3.*", "norm2.*"),  # the one norm with parameters
    ("ffn.0.*", "ffn.net.0.proj.*"),
    ("ffn.2.*", "ffn.net.2.*"),
)
TRANSFORMER = _same_values(
    (
        ("patch_embedding.*", "patch_embedding.*"),
        ("text_embedding.0.*", "condition_embedder.text_embedder.linear_1.*"),
        ("text_embedding.2.*", "condition_embedder.text_embedder.linear_2.*"),
        ("time_embedding.0.*", "condition_embedder.time_embedder.linear_1.*"),
        ("time_embedding.2.*", "condition_embedder.time_embedder.linear_2.*"),
        ("time_projection.1.*", "condition_embedder.time_proj.*"),
        ("head.head.*", "proj_out.*"),
        ("head.modulation", "scale_shift_table"),
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        ("img_emb.proj.0.*", "condition_embedder.image_embedder.norm1.*"),
        ("img_emb.proj.1.*", "condition_embedder.image_embedder.ff.net.0.proj.*"),
        ("img_emb.proj.3.*", "condition_embedder.image_embedder.ff.net.2.*"),
        ("img_emb.proj.4.*", "condition_embedder.image_embedder.norm2.*"),
        ("vace_patch_embedding.*", "vace_patch_embedding.*"),
        ("vace_blocks.#.before_proj.*", "vace_blocks.#.proj_in.*"),
        ("vace_blocks.#.after_proj.*", "vace_blocks.#.proj_out.*"),
    ),
    ((f"blocks.#.{a}", f"blocks.#.{b}") for a, b in _BLOCK),
    ((f"vace_blocks.#.{a}", f"vace_blocks.#.{b}") for a, b in _BLOCK),
)

UMT5 = _same_values(
    (
        ("token_embedding.weight", "shared.weight"),
        ("norm.weight", "encoder.final_layer_norm.weight"),
    ),
    (
        (f"blocks.#.{a}.weight", f"encoder.block.#.layer.{b}.weight")
        for a, b in (
            ("norm1", "0.layer_norm"),
            *((f"attn.{letter}", f"0.SelfAttention.{letter}") for letter in "qkvo"),
            ("pos_embedding.embedding", "0.SelfAttention.relative_attention_bias"),
            ("norm2", "1.layer_norm"),
            ("ffn.gate.0", "1.DenseReluDense.wi_0"),
            ("ffn.fc1", "1.DenseReluDense.wi_1"),
            ("ffn.fc2", "1.DenseReluDense.wo"),
        )
    ),
)
# transformers may store the token embedding a second time, under this name.
UMT5_ALIAS = ("encoder.embed_tokens.weight", "shared.weight")

_CLIP_LAYER = (
    ("norm1", "layer_norm1"),
    ("attn.proj", "self_attn.out_proj"),
    ("norm2", "layer_norm2"),
    ("mlp.0", "mlp.fc1"),
    ("mlp.2", "mlp.fc2"),
)
CLIP = NameMap(
    (
        Rule("visual.cls_embedding", ("vision_model.embeddings.class_embedding",), "unit dimensions", 1),
        Rule("visual.pos_embedding", ("vision_model.embeddings.position_embedding.weight",), "unit dimensions", 2),
        Rule("visual.patch_embedding.weight", ("vision_model.embeddings.patch_embedding.weight",)),
        Rule("visual.pre_norm.*", ("vision_model.pre_layrnorm.*",)),
        Rule("visual.post_norm.*", ("vision_model.post_layernorm.*",)),
        Rule("visual.head", ("visual_projection.weight",), "transposed"),
        Rule(
            "visual.transformer.#.attn.to_qkv.*",
            tuple(f"vision_model.encoder.layers.#.self_attn.{letter}_proj.*" for letter in "qkv"),
            "rows",
        ),
        *(Rule(f"visual.transformer.#.{a}.*", (f"vision_model.encoder.layers.#.{b}.*",)) for a, b in _CLIP_LAYER),
    )
)

_RESIDUAL = (
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.*", "conv1.*"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.*", "conv2.*"),
    ("shortcut.*", "conv_shortcut.*"),
)
_RESAMPLE = (("resample.1.*", "resample.1.*"), ("time_conv.*", "time_conv.*"))


def vae_names(levels: int, num_res_blocks: int) -> NameMap:
    """Return the rules of a VAE; the original counts the layers of its decoder through all levels, diffusers per level.

    Args:
        levels: resolutions, as many as `VaeConfig.dim_mult` has entries.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
    """
    stride = num_res_blocks + 2  # of a level of the decoder: its residual blocks and one resampling
    decoder: list[tuple[tuple[str, str], _Table]] = []
    for level in range(levels):
        for block in range(stride - 1):
            names = (f"decoder.upsamples.{level * stride + block}", f"decoder.up_blocks.{level}.resnets.{block}")
            decoder.append((names, _RESIDUAL))
        names = (f"decoder.upsamples.{level * stride + stride - 1}", f"decoder.up_blocks.{level}.upsamplers.0")
        decoder.append((names, _RESAMPLE))
    return _same_values(
        (("conv1.*", "quant_conv.*"), ("conv2.*", "post_quant_conv.*")),
        *(_vae_ends(side) for side in ("encoder", "decoder")),
        ((f"encoder.downsamples.#.{a}", f"encoder.down_blocks.#.{b}") for a, b in (*_RESIDUAL, *_RESAMPLE)),
        ((f"{names[0]}.{a}", f"{names[1]}.{b}") for names, table in decoder for a, b in table),
    )


def _vae_ends(side: str) -> list[tuple[str, str]]:
    """What encoder and decoder have in common."""
    attention = (("norm.gamma", "norm.gamma"), ("to_qkv.*", "to_qkv.*"), ("proj.*", "proj.*"))
    middle: tuple[tuple[str, str, _Table], ...] = (
        ("middle.0", "resnets.0", _RESIDUAL),
        ("middle.1", "attentions.0", attention),
        ("middle.2", "resnets.1", _RESIDUAL),
    )
    return [
        (f"{side}.conv1.*", f"{side}.conv_in.*"),
        (f"{side}.head.0.gamma", f"{side}.norm_out.gamma"),
        (f"{side}.head.2.*", f"{side}.conv_out.*"),
        *((f"{side}.{a}.{x}", f"{side}.mid_block.{b}.{y}") for a, b, table in middle for x, y in table),
    ]
