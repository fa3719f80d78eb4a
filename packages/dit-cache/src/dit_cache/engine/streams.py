"""Which arguments of a block are the residual stream, and how they come out of it again.

A block takes one stream and returns it, or takes two (of the latents and of the text) and returns both in a tuple.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit_cache.engine.moment import Streams
from dit_cache.errors import ConfigError, ModelExecError

Slot = tuple[int, str]  # where an argument may be: its position, its name
_NOWHERE = 1 << 30  # the position of an argument that comes by name only


@dataclass(frozen=True)
class Layout:
    """The streams of a block.

    Attributes:
        slots: the argument of each stream, in the order in which the block returns them.
        bare: whether the block returns a tensor; a tuple otherwise.
    """

    slots: tuple[Slot, ...]
    bare: bool

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """Return the streams that a block was called with."""
        return tuple(_argument(slot, args, kwargs) for slot in self.slots)

    def pack(self, streams: Streams) -> Tensor | Streams:
        """Return streams in the form in which the block does."""
        return streams[0] if self.bare else streams

    def unpack(self, output: Any) -> Streams:
        """Return the streams of an output.

        Raises:
            ModelExecError: it has another form.
        """
        streams = unpack(output)
        if isinstance(output, Tensor) != self.bare or len(streams) != len(self.slots):
            raise ModelExecError(
                f"a block returned {_form(output)}, and {'a tensor' if self.bare else f'a tuple of {len(self.slots)}'} "
                "was expected. All blocks have to return the same streams; for a model that is compiled before it was "
                "called once, name them: streams=(...), in the order in which a block returns them"
            )
        return streams


def unpack(output: Any) -> Streams:
    """Return a tensor, or a tuple of tensors, as a tuple.

    Raises:
        ModelExecError: it is something else.
    """
    streams = (output,) if isinstance(output, Tensor) else output
    if not isinstance(streams, tuple) or not streams or not all(isinstance(stream, Tensor) for stream in streams):
        raise ModelExecError(f"a tensor or a tuple of tensors can be cached, but {_form(output)} was returned")
    return streams


def parameters(block: nn.Module) -> tuple[str, ...]:
    """Return the names of the positional parameters of a block, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(block.forward).parameters.items() if p.kind in kinds)


def announced(block: nn.Module, streams: Sequence[str] | None) -> Layout:
    """Return the layout as far as it can be known before a call: the streams that are named, or the first argument.

    Raises:
        ConfigError: a name is not an argument of the block.
    """
    names = parameters(block)
    if streams is None:
        return Layout(((0, names[0] if names else ""),), bare=True)
    taken = inspect.signature(block.forward).parameters
    unknown = [name for name in streams if name not in taken]
    if unknown and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        raise ConfigError(f"streams are {list(streams)}; a block does not take {unknown}, it takes {list(taken)}")
    if not streams or len(set(streams)) < len(streams):
        raise ConfigError(f"streams are {list(streams)}; name each once, in the order in which a block returns them")
    slots = tuple((names.index(name) if name in names else _NOWHERE, name) for name in streams)
    return Layout(slots, bare=len(slots) == 1)


def tensors(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Slot, Tensor]:
    """Return the floating point tensors among the arguments of a block, in order."""
    given: dict[Slot, Any] = {(n, names[n] if n < len(names) else ""): value for n, value in enumerate(args)}
    for name, value in kwargs.items():
        given[names.index(name) if name in names else _NOWHERE, name] = value
    return {slot: t for slot, t in sorted(given.items(), key=lambda item: item[0][0]) if _is_stream(t)}


def learn(given: Mapping[Slot, Tensor], output: Any) -> Layout:
    """Find the streams of a block by their shapes.

    Args:
        given: the tensors it was called with.
        output: what it returned.

    Raises:
        ModelExecError: the shapes leave it open.
    """
    outputs = unpack(output)
    bare = isinstance(output, Tensor)
    slots = [_match(given, stream, first=len(outputs) == 1) for stream in outputs]
    found = [slot for slot in slots if slot is not None]
    if len(set(found)) < len(outputs):
        shapes = {slot[1] or slot[0]: list(tensor.shape) for slot, tensor in given.items()}
        raise ModelExecError(
            f"a block was called with {shapes} and returned {[list(stream.shape) for stream in outputs]}: which is "
            'which is not clear. Name them in the order in which a block returns them: streams=("hidden_states", ...)'
        )
    return Layout(tuple(found), bare)


def _match(given: Mapping[Slot, Tensor], stream: Tensor, *, first: bool) -> Slot | None:
    fits = [slot for slot, tensor in given.items() if tensor.shape == stream.shape]
    if len(fits) == 1 or (first and fits and fits[0][0] == 0):  # a block's first argument is its stream, by custom
        return fits[0]
    return None


def _argument(slot: Slot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    position, name = slot
    value = args[position] if position < len(args) else kwargs.get(name)
    if not isinstance(value, Tensor):
        raise ModelExecError(f"the argument {name or position} of a block is a stream, but no tensor was given for it")
    return value


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _form(output: Any) -> str:
    if isinstance(output, tuple):
        return f"a tuple of {len(output)} ({', '.join(type(part).__name__ for part in output)})"
    return f"a {type(output).__name__}"
