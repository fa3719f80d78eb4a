"""Numbers as JSON can carry them."""

from __future__ import annotations

import math


def jsonable(value: float | None) -> float | str | None:
    """The number itself, or "inf", "-inf" and "nan", which `float` reads back and strict JSON cannot say."""
    return value if value is None or math.isfinite(value) else str(float(value))
