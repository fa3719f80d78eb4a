"""How a family's table is written: rows of (Hugging Face name, Megatron name, operation).

In a name, ``{i}`` is the global layer and ``{j}`` the layer inside its stage; ``{q,k,v}_proj`` stands for
several tensors that become one, in that order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mm_convert.layout import Part
from mm_convert.rules import Copy, Operation, Rule, Split, Where

Row = tuple[str, str, Operation]

CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def table(part: Part, rows: Iterable[Row], *, hf: str = "", mm: str = "", where: Where = "layer") -> list[Rule]:
    """Rules from rows.

    Args:
        part: the layer lists that place these tensors.
        rows: names (without the prefixes) and operations.
        hf: what every Hugging Face name begins with.
        mm: what every Megatron name begins with.
        where: see :class:`mm_convert.rules.Rule`.
    """
    return [
        Rule(hf=_alternatives(hf + source), mm=mm + target, operation=operation, part=part, where=where)
        for source, target, operation in rows
    ]


def both(hf: str, mm: str, operation: Operation) -> list[Row]:
    """Weight and bias, under the same operation."""
    return [(f"{hf}.{kind}", f"{mm}.{kind}", operation) for kind in ("weight", "bias")]


def copied(hf: str, mm: str) -> list[Row]:
    """Weight and bias, the same on every rank: a norm, or a layer that is not divided."""
    return both(hf, mm, Copy())


def column(hf: str, mm: str) -> list[Row]:
    """A column-parallel layer with a bias: output features are divided."""
    return both(hf, mm, Split(0))


def row(hf: str, mm: str) -> list[Row]:
    """A row-parallel layer with a bias: input features are divided, and the bias is on every rank."""
    return [(f"{hf}.weight", f"{mm}.weight", Split(1)), (f"{hf}.bias", f"{mm}.bias", Copy())]


def _alternatives(name: str) -> tuple[str, ...]:
    match = CHOICE.search(name)
    if match is None:
        return (name,)
    return tuple(name[: match.start()] + choice + name[match.end() :] for choice in match[1].split(","))
