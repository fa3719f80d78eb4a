"""The canonical structure: query, key and value, and gate and up projection, stand apart, as adapters want them.

Published as ``enable_canonical_hf_struct``. It needs no table of its own: it is what is left of a family's rules when
nothing is fused. A vision attention whose query, key and value are one tensor on the Hugging Face side keeps that
tensor's name and order; the training code reads a rank's rows as ``[q_t; k_t; v_t]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from mm_convert.families.family import Family
from mm_convert.rules import ZERO, Gated, GroupedQKV, Rule, Split, Stacked, StackedQKV

APART = {GroupedQKV: ("linear_qkv", ("q_proj", "k_proj", "v_proj")), Gated: ("linear_fc1", ("gate_proj", "up_proj"))}
"""The Megatron name of a fused tensor, and those of its sources, by operation."""

CANONICAL = re.compile(r"\.(self_attention\.[qkv]|mlp\.(gate|up))_proj\.")


def canonical(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """A family's rules without fused tensors.

    Args:
        rules: the rules of the fused structure.
    """
    return tuple(apart for rule in rules for apart in _apart(rule))


def unfused(family: Family) -> Family:
    """A family whose Megatron-style folders have the canonical structure."""
    return replace(family, rules=lambda sizes, pp_size: canonical(family.rules(sizes, pp_size)))


def as_it_stands(family: Family, names: Iterable[str]) -> Family:
    """A family in the structure that the names of a Megatron-style checkpoint show."""
    return unfused(family) if is_canonical(names) else family


def is_canonical(names: Iterable[str]) -> bool:
    """Whether the names of a Megatron-style checkpoint are those of the canonical structure."""
    return any(CANONICAL.search(name) for name in names)


def _apart(rule: Rule) -> Iterator[Rule]:
    if isinstance(rule.operation, StackedQKV):
        yield replace(rule, operation=Stacked(3))
        return
    fused, names = APART.get(type(rule.operation), ("", ()))
    if fused not in rule.mm or len(rule.hf) != len(names):
        yield rule
        return
    for source, name in zip(rule.hf, names, strict=True):
        if source == ZERO:
            continue  # a bias that only the fused tensor needs
        yield replace(rule, hf=(source,), mm=rule.mm.replace(fused, name), operation=Split(0))
