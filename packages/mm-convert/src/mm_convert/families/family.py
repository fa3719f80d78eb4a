"""What a model family declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mm_convert.errors import LayoutError
from mm_convert.layout import Layout
from mm_convert.rules import Rule


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
        divided: the layout divides tensors over tensor-parallel ranks; otherwise tp_size must be 1.
    """

    llm_layers: int
    vit_layers: int = 0
    key_value_heads: int = 0
    vision_heads: int = 0
    tied: bool = False
    deepstack: tuple[int, ...] = ()
    features: frozenset[str] = frozenset()
    divided: bool = True

    def check(self, layout: Layout) -> None:
        """Raise LayoutError unless the layout fits."""
        layout.check_sums(llm_layers=self.llm_layers, vit_layers=self.vit_layers)
        if not self.divided and layout.tp_size != 1:
            raise LayoutError(
                f"tp_size {layout.tp_size}: the layout of this model does not divide tensors over tensor-parallel"
                " ranks; legal for this model: [1]"
            )
        for name, heads in (
            ("num_key_value_heads", self.key_value_heads),
            ("the number of vision heads", self.vision_heads),
        ):
            if heads % layout.tp_size:
                legal = [t for t in range(1, heads + 1) if heads % t == 0]
                raise LayoutError(
                    f"tp_size {layout.tp_size} does not divide {name}, {heads}: a rank holds whole heads, because"
                    f" key/value heads cannot be split or copied; legal for this model: {legal}"
                )


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
    """

    model_types: tuple[str, ...]
    sizes: Callable[[Mapping[str, Any]], ModelSizes]
    rules: Callable[[ModelSizes, int], tuple[Rule, ...]]
    class_names: tuple[str, ...] = ()
    renames: tuple[tuple[re.Pattern[str], str], ...] = ()

    def accepts(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is that of a model of this family."""
        model_type = config.get("model_type")
        return config.get("_class_name") in self.class_names if model_type is None else model_type in self.model_types

    def canonical(self, name: str) -> str:
        """The name that the rules use for a tensor of a Hugging Face checkpoint."""
        for pattern, replacement in self.renames:
            name = pattern.sub(replacement, name)
        return name
