"""A part that is loaded when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar, cast

from torch import nn

from wan_infer.errors import RequestError

T = TypeVar("T")


class Lazy(Generic[T]):
    """Holds a part, or how to load it.

    Args:
        name: what it is called in messages.
        given: the part, a function that returns it, or None if there is none. A module is a part, never a function:
            what `torch.compile` makes of a part stands for it.
        kind: its class.
    """

    def __init__(self, name: str, given: T | Callable[[], T] | None, kind: type[T]) -> None:
        self._name = name
        self._part: T | None = None
        self._load: Callable[[], T] | None = None
        if isinstance(given, kind | nn.Module):
            self._part = cast(T, given)
        else:
            self._load = cast("Callable[[], T] | None", given)

    def get(self) -> T:
        """Return the part.

        Raises:
            RequestError: this pipeline was made without it.
        """
        if self._part is None:
            if self._load is None:
                raise RequestError(f"this needs a {self._name}, and the pipeline was made without one")
            self._part = self._load()
        return self._part

    def release(self) -> None:
        """Drop the part if it can be loaded again."""
        if self._load is not None:
            self._part = None
