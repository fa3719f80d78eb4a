"""Reads the table of ``npu-smi info``.

Rows are split at ``|``; widths and columns differ from version to version and are never counted.
"""

from __future__ import annotations

from dataclasses import dataclass

_HEALTH = {"OK", "Warning", "Alarm", "Critical", "UNKNOWN"}


@dataclass(frozen=True)
class Chip:
    """One device row: 910B2, OK."""

    name: str
    health: str


def chips(text: str) -> tuple[Chip, ...]:
    """The chips of a table, in its order; none in anything that is not such a table."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        health = next((place for place, cell in enumerate(cells) if place > 0 and cell in _HEALTH), None)
        if health is not None and cells[health - 1]:
            # "0     910B2" in one cell, or the number and the name in two.
            found.append(Chip(name=cells[health - 1].split()[-1], health=cells[health]))
    return tuple(found)
