"""How our model of a vendor's operator says no."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


class VendorRefuses(ValueError):
    """The vendor's documentation does not allow this call; on a device it would fail or compute something else."""


class NotModelled(NotImplementedError):
    """The vendor documents it, but no code of ours needs it: our model does not compute it."""


def require(holds: bool, message: str) -> None:
    """Raise `VendorRefuses` with `message` unless `holds`."""
    if not holds:
        raise VendorRefuses(message)


def require_one_of(name: str, value: object, legal: Collection[object]) -> None:
    """Raise `VendorRefuses` unless `value` is legal."""
    require(value in legal, f"{name} is {value!r}, documented are {', '.join(map(repr, legal))}")


def require_unused(**arguments: Any) -> None:
    """Raise `NotModelled` when one of the arguments is given: not None, and not what leaves it out."""
    if used := [name for name, value in arguments.items() if value is not None]:
        raise NotModelled(f"not modelled: {', '.join(used)}")
