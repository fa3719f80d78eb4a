"""How many layouts are compared: the first of a list in every run of the tests, with ``FINETUNE_LAYOUTS=all`` all."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any, TypeVar

Cases = TypeVar("Cases", list[dict[str, Any]], dict[str, Any])


def first(cases: Cases, count: int) -> Cases:
    """The first `count` cases, or all: ``nox -s finetune-layouts`` compares them."""
    if os.environ.get("FINETUNE_LAYOUTS") == "all":
        return cases
    return dict(islice(cases.items(), count)) if isinstance(cases, dict) else cases[:count]
