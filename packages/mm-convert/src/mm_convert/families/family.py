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
    """The numbers of ``config.json`` that conversion needs."""

    llm_layers: int
    vit_layers: int
    key_value_heads: int
    vision_heads: int
    tied: bool

    def check(self, layout: Layout) -> None:
        """Raise LayoutError unless the layout fits."""
        layout.check_sums(llm_layers=self.llm_layers, vit_layers=self.vit_layers)
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
        sizes: reads the numbers out of ``config.json``.
        rules: the rules for a model of these sizes in a pipeline of `pp_size` ranks.
        renames: other spellings of the Hugging Face names, as (pattern, replacement), the newest
            transformers' names among them.
    """

    model_types: tuple[str, ...]
    sizes: Callable[[Mapping[str, Any]], ModelSizes]
    rules: Callable[[ModelSizes, int], tuple[Rule, ...]]
    renames: tuple[tuple[re.Pattern[str], str], ...] = ()

    def canonical(self, name: str) -> str:
        """The name that the rules use for a tensor of a Hugging Face checkpoint."""
        for pattern, replacement in self.renames:
            name = pattern.sub(replacement, name)
        return name
