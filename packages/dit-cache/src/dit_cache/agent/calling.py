"""How a block is called: with what the caller gave, by keyword or by position as the block's signature takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

HIDDEN, ENCODER = "hidden_states", "encoder_hidden_states"


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a block, of which `hidden_states` and `encoder_hidden_states` were given by keyword.

    No single convention serves all blocks: one names its first parameter `x`, another takes `hidden_states` by keyword
    only, or not in the first place. So the streams stay keywords where the signature has these names. Where it has not,
    or where they collide with `args`, they come first, in this order and by position, as MindIE SD passes them; and
    if that does not fit either, only `hidden_states` does.
    """
    args, kwargs = _convention(function, args, kwargs)
    return function(*args, **kwargs)


def _convention(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    signature = _signature(function)
    streams = [name for name in (HIDDEN, ENCODER) if name in kwargs]
    by_position = _moved(streams, args, kwargs)
    if signature is None:
        return by_position
    as_given = (args, kwargs)
    named = all(name in signature.parameters for name in streams)
    forms = [by_position, _moved(streams[:1], args, kwargs)]
    forms.insert(0 if named else len(forms), as_given)
    # Where none fits, the block itself says why.
    return next((form for form in forms if _binds(signature, *form)), forms[0])


def _moved(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rest = {name: value for name, value in kwargs.items() if name not in names}
    return (*(kwargs[name] for name in names), *args), rest


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:  # a builtin without one
        return None


def _binds(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
