"""attention_cache: the output of each call is returned again in place of the next ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dit_cache.agent.config import Plan


class AttentionOutputs:
    """What one branch keeps: a copy of the output of each block, from the refresh to its last use.

    A copy, because a caller may add into what it got. Nested tuples, lists and dicts are copied with their tensors; an
    object of another kind is kept and handed out as it is.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.clear()

    def clear(self) -> None:
        """Drop all."""
        self._kept: dict[int, tuple[int, Any]] = {}  # by block: the step it was computed in, and the output

    def expire(self, step: int) -> None:
        """Drop what no pass of `step` or later can use."""
        self._kept = {block: kept for block, kept in self._kept.items() if self._plan.serves(kept[0], step)}

    def tensors(self) -> list[Tensor]:
        """Return what is held now."""
        return [tensor for _, output in self._kept.values() for tensor in _tensors(output)]

    def run(
        self, step: int, block: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        """Return the function's result, or the kept one, and whether it was computed."""
        plan = self._plan
        if plan.reuses(step) and block in self._kept and plan.serves(self._kept[block][0], step):
            if plan.last_reuse(step):
                return self._kept.pop(block)[1], False
            return _copied(self._kept[block][1]), False
        self._kept.pop(block, None)
        result = function(*args, **kwargs)
        if plan.keeps(step):
            self._kept[block] = (step, _copied(result))
        return result, True


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(item) for item in value))
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return [tensor for item in items for tensor in _tensors(item)]
    return []
