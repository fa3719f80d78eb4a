"""What a model family declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mm_convert.errors import LayoutError
from mm_convert.layout import PARTS, Layout, Part
from mm_convert.rules import Rule, Shape

LAYER_NAMES: Mapping[Part, str] = {
    "llm": "text_decoder.decoder.layers.",
    "vit": "image_encoder.encoder.blocks.layers.",
    "audio": "audio_encoder.encoder.blocks.layers.",
}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The numbers of ``config.json`` that conversion needs.

    Args:
        llm_layers: language layers, or the blocks of a model that has one kind of layer.
        vit_layers: vision layers; 0 for a text model.
        key_value_heads: key/value heads of a language layer; 0 if nothing is cut by them.
        vision_heads: heads of a vision layer; 0 for a text model.
        tied: the output layer is the embedding.
        deepstack: vision layers whose output goes to the language model through a merger of its own.
        features: what some models of the family have and others don't, in the family's own words.
        audio_layers: audio layers; 0 for a model that hears nothing.
        audio_heads: heads of an audio layer.
        experts: experts of a language layer; 0 for a dense model.
        experts_per_token: how many of them a token passes.
        expert_matrix: hidden size and intermediate size of an expert; zeros where that is not known.
        uneven: vision heads need not be divisible by tp_size.
        vocabulary: tokens; 0 where that is not known, or there are none.
    """

    llm_layers: int
    vit_layers: int = 0
    key_value_heads: int = 0
    vision_heads: int = 0
    tied: bool = False
    deepstack: tuple[int, ...] = ()
    features: frozenset[str] = frozenset()
    audio_layers: int = 0
    audio_heads: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_matrix: tuple[int, int] = (0, 0)
    uneven: bool = False
    vocabulary: int = 0

    @property
    def layers(self) -> tuple[int, int, int]:
        """Layers of each part, in the order of `PARTS`."""
        return self.llm_layers, self.vit_layers, self.audio_layers

    def check_whole(self, layout: Layout, where: object) -> None:
        """Raise LayoutError unless a checkpoint of this layout holds all layers of the model, and those alone."""
        if layout.layers != self.layers:
            held, wanted = (
                ", ".join(f"{count} {part}" for part, count in zip(PARTS, layers, strict=True) if count)
                for layers in (layout.layers, self.layers)
            )
            raise LayoutError(
                f"{where} holds {held or 'no'} layers ({layout}), but the model has {wanted}: it is another model's, a"
                " part of one, or lacks the folder of a pipeline rank"
            )

    def check(self, layout: Layout) -> None:
        """Raise LayoutError unless the layout fits."""
        layout.check_sums(llm_layers=self.llm_layers, vit_layers=self.vit_layers, audio_layers=self.audio_layers)
        for name, heads, tp_size in (
            ("num_key_value_heads", self.key_value_heads, layout.tp_size),
            ("the number of vision heads", 0 if self.uneven else self.vision_heads, layout.tp("vit")),
            ("the number of audio heads", self.audio_heads, layout.tp("audio")),
        ):
            if heads % tp_size:
                legal = [t for t in range(1, heads + 1) if heads % t == 0]
                raise LayoutError(
                    f"tp_size {tp_size} does not divide {name}, {heads}: a rank holds whole heads, because"
                    f" key/value heads cannot be split or copied; legal for this model: {legal}"
                )
        if self.experts % layout.ep_size or layout.ep_size > max(1, self.experts):
            legal = [n for n in range(1, max(1, self.experts) + 1) if self.experts % n == 0] if self.experts else [1]
            raise LayoutError(
                f"ep_size {layout.ep_size} does not divide the number of experts, {self.experts}; legal for this"
                f" model: {legal}"
            )


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One way to write a model's Hugging Face names.

    Args:
        renames: from the rules' names to these, as (pattern, replacement), applied in order.
        config: the ``config.json`` that goes with these names, from that of another spelling and the shapes of the
            tensors by the rules' names; None where one goes with all of them.
    """

    renames: tuple[tuple[re.Pattern[str], str], ...] = ()
    config: Callable[[Mapping[str, Any], Mapping[str, Shape]], dict[str, Any]] | None = None

    def name(self, canonical: str) -> str:
        """The tensor that the rules call `canonical`, in this spelling."""
        for pattern, replacement in self.renames:
            canonical = pattern.sub(replacement, canonical)
        return canonical


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the converter table.

    Args:
        model_types: the ``model_type`` values of ``config.json`` that belong here.
        class_names: the ``_class_name`` values of diffusers' ``config.json``, which has no ``model_type``.
        sizes: reads the numbers out of ``config.json``.
        rules: the rules for a model of these sizes in a pipeline of `pp_size` ranks.
        renames: other spellings of the Hugging Face names, as (pattern, replacement), the newest
            transformers' names among them.
        stacked: Hugging Face tensors that hold a matrix of each expert, one over another; rules see ``name[0]``,
            ``name[1]``, ….
        layer_names: what the names of a part's layers begin with in the Megatron layout, up to the number.
        features: what tells in the Megatron layout that a model has a feature: the beginning of a name.
        divided: the layout divides tensors over tensor-parallel ranks; otherwise tp_size must be 1.
        uneven: as in :class:`ModelSizes`, for a folder without ``config.json``.
        unfusable: there is a structure without fused tensors, and with it adapters.
        pipeline: whether the layout has several stages, and virtual ones.
        kept: Hugging Face tensors that are not converted, with ``*`` as in file names: they stay in the template.
        original_config: what ``config.json`` would say of an original release's single file, from the shapes of its
            tensors; None where there is no such file.
        original_unused: what else stands in such a file.
        spellings: the ways to write the Hugging Face names that a user can ask for; empty where there is one.
        generative: the layout and the command line are those of the generative models: ``source_path`` and
            ``target_path``, and a ``checkpoint_version`` in rank files with virtual stages only.
    """

    model_types: tuple[str, ...]
    sizes: Callable[[Mapping[str, Any]], ModelSizes]
    rules: Callable[[ModelSizes, int], tuple[Rule, ...]]
    class_names: tuple[str, ...] = ()
    renames: tuple[tuple[re.Pattern[str], str], ...] = ()
    stacked: tuple[re.Pattern[str], ...] = ()
    layer_names: Mapping[Part, str] = field(default_factory=lambda: LAYER_NAMES)
    features: Mapping[str, str] = field(default_factory=dict)
    divided: bool = True
    uneven: bool = False
    unfusable: bool = True
    pipeline: Literal["none", "plain", "virtual"] = "virtual"
    kept: tuple[str, ...] = ()
    original_config: Callable[[Mapping[str, Shape]], dict[str, Any]] | None = None
    original_unused: re.Pattern[str] | None = None
    spellings: Mapping[str, Spelling] = field(default_factory=dict)
    generative: bool = False

    def check(self, layout: Layout) -> None:
        """Raise LayoutError unless the family has layouts of this kind."""
        if not self.divided and layout.tp_size != 1:
            raise LayoutError(
                f"tp_size {layout.tp_size}: the layout of this model does not divide tensors over tensor-parallel"
                " ranks; legal for this model: [1]"
            )
        if self.pipeline == "none" and layout.pp_size * layout.vpp_size != 1:
            raise LayoutError(
                f"{layout.pp_size} pipeline ranks of {layout.vpp_size} virtual stages: this model has no pipeline; give"
                " one rank all layers"
            )
        if self.pipeline == "plain" and layout.vpp_size != 1:
            raise LayoutError(
                f"{layout.vpp_size} virtual stages: this model's pipeline has none; give one row, as in [[10,10]]"
            )

    def accepts(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is that of a model of this family."""
        model_type = config.get("model_type")
        return config.get("_class_name") in self.class_names if model_type is None else model_type in self.model_types

    def canonical(self, name: str) -> str:
        """The name that the rules use for a tensor of a Hugging Face checkpoint."""
        for pattern, replacement in self.renames:
            name = pattern.sub(replacement, name)
        return name
