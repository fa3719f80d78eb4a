"""What is cached inside a model: the change of the residual stream over some blocks, or the output of an attention.

What stands here may be traced by `torch.compile`: it reads and writes plain attributes, and whatever takes decisions is
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_cache.engine.moment import Streams
from dit_cache.engine.sites import Site, compiler
from dit_cache.engine.streams import Layout, Slot, announced, learn, parameters, tensors, unpack
from dit_cache.errors import ModelExecError


class Place:
    """One thing that is cached in one model, for one evaluation at a time.

    Attributes:
        key: of its memory.
        live: whether this evaluation is cached at all.
        skip: whether it is a hole.
        prediction: what is put in the hole.
        value: what was computed.
        keep: takes the value over at once, where it cannot wait for the end of the evaluation.
        done: whether its end was reached.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.sites: list[Site] = []
        self.reset()

    def reset(self) -> None:
        """Forget the evaluation; the modules compute as if nothing was attached."""
        self.live = self.skip = self.done = False
        self.prediction: Streams | None = None
        self.value: Streams | None = None
        self.keep: Callable[[Place], None] | None = None

    def fill(self, predict: Callable[[], Streams]) -> None:
        """Make this evaluation a hole."""
        self.skip = True
        self.prediction = predict()


class Stretch(Place):
    """The change of the residual stream over a stretch of blocks.

    On the way through, one buffer takes ``-hidden`` before the first block and adds the output of the last: it is
    right for blocks that write into their input, and holds what the model itself adds between the blocks. In a hole,
    the result is made before the first block, the blocks hand on what they are given, and the last hands out the
    result.

    Args:
        key: of its memory.
        blocks: all blocks of the model.
        between: the stretch, from a block up to another that is not in it any more.
        streams: names of the streams.
        probe: whether the decision falls on the way, before the first block of the stretch; all blocks before it are
            then computed, and what they add is known.
    """

    def __init__(
        self,
        key: str,
        blocks: Sequence[nn.Module],
        between: tuple[int, int],
        *,
        streams: Sequence[str] | None = None,
        probe: bool = False,
    ) -> None:
        start, end = between
        self.layout = announced(blocks[0], streams)
        self._named = streams is not None
        self._known = False
        self._names = parameters(blocks[0])
        self._negative: Streams = ()
        self._probed: Streams = ()
        super().__init__(key)
        if probe:
            self.sites.append(_Opening(blocks[0], self))
        inside = blocks[start:end]
        self.sites += [_Inside(block, self, n == 0, n == len(inside) - 1) for n, block in enumerate(inside)]

    def reset(self) -> None:
        """See `Place`."""
        super().reset()
        self.decide: Callable[[Streams], None] | None = None
        self._negative = self._probed = ()

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Slot, Tensor]:
        """Return the negative of each stream; of all that may be one, as long as that is not known."""
        if self._named or self._known or torch.compiler.is_compiling():
            given = dict(zip(self.layout.slots, self.layout.read(args, kwargs), strict=True))
        else:
            given = tensors(self._names, args, kwargs)
        return {slot: tensor.detach().neg() for slot, tensor in given.items()}

    def after(self, negative: dict[Slot, Tensor], output: Any) -> Streams:
        """Return the negatives of the streams, in the order of the output."""
        if not torch.compiler.is_compiling() and not self._known:
            bare = isinstance(output, Tensor)
            self.layout = Layout(self.layout.slots, bare) if self._named else learn(negative, output)
            self._known = True
        self.layout.unpack(output)
        return tuple(negative[slot] for slot in self.layout.slots)

    def open(self, negative: Streams) -> None:
        """Keep the input of the model's first block, for the probe."""
        self._probed = negative

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide, where that was left open, and fill a hole."""
        if not torch.compiler.is_compiling() and (self.done or self._negative):
            raise ModelExecError("a block was run twice in one call of the model; such a model cannot be cached")
        if self.decide is not None:
            probed = _plus(self._probed, self.layout.read(args, kwargs))
            self._probed = ()
            if torch.compiler.is_compiling():
                compiler.disable(self.decide)(probed)
            else:
                self.decide(probed)
        if self.skip:
            self.value = self._filled(self.layout.read(args, kwargs))

    def start(self, negative: Streams) -> None:
        """Begin the buffer."""
        self._negative = negative

    def leave(self, output: Any) -> None:
        """Complete the buffer."""
        self.value = _plus(self._negative, self.layout.unpack(output))
        self._negative = ()

    def _filled(self, hidden: Streams) -> Streams:
        predicted = self.prediction or ()
        if [tensor.shape for tensor in hidden] != [tensor.shape for tensor in predicted]:
            raise ModelExecError(
                f"the blocks are given {[list(tensor.shape) for tensor in hidden]}, but what is kept of this "
                f"generation has the shape {[list(tensor.shape) for tensor in predicted]}"
            )
        return tuple(tensor.to(change.dtype) + change for tensor, change in zip(hidden, predicted, strict=True))


class _Opening(Site):
    """The first block of the model, where a probe begins."""

    def __init__(self, module: nn.Module, stretch: Stretch) -> None:
        super().__init__(module)
        self.stretch = stretch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `Site`."""
        if not self.stretch.live:
            return self.inner(*args, **kwargs)
        negative = self.stretch.before(args, kwargs)
        output = self.inner(*args, **kwargs)
        self.stretch.open(self.stretch.after(negative, output))
        return output


class _Inside(Site):
    """A block of a stretch."""

    def __init__(self, module: nn.Module, stretch: Stretch, first: bool, last: bool) -> None:
        super().__init__(module)
        self.stretch, self.first, self.last = stretch, first, last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `Site`."""
        stretch = self.stretch
        if not stretch.live:
            return self.inner(*args, **kwargs)
        if self.first:
            stretch.enter(args, kwargs)
        output = self._skipped(args, kwargs) if stretch.skip else self._computed(args, kwargs)
        if self.last:
            stretch.done = True
        return output

    def _skipped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layout, result = self.stretch.layout, self.stretch.value
        return layout.pack(result if self.last and result is not None else layout.read(args, kwargs))

    def _computed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        negative = self.stretch.before(args, kwargs) if self.first else {}
        output = self.inner(*args, **kwargs)
        if self.first:
            self.stretch.start(self.stretch.after(negative, output))
        if self.last:
            self.stretch.leave(output)
        return output


class Output(Place):
    """The output of one module, such as an attention.

    Args:
        key: of its memory.
        module: the module.
    """

    def __init__(self, key: str, module: nn.Module) -> None:
        self.bare = True
        self.traced = False  # whether a compiler reads this: predictions and values are then taken over outside
        super().__init__(key)
        self.sites.append(_Outlet(module, self))

    def reset(self) -> None:
        """See `Place`."""
        super().reset()
        self.predict: Callable[[], Streams] | None = None

    def fill(self, predict: Callable[[], Streams]) -> None:
        """See `Place`; predicted one by one where that can be, because there are as many as blocks."""
        self.skip = True
        self.predict = predict
        if self.traced:
            self.prediction = predict()


class _Outlet(Site):
    """A module whose output is cached."""

    def __init__(self, module: nn.Module, place: Output) -> None:
        super().__init__(module)
        self.place = place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `Site`."""
        place = self.place
        if not place.live:
            return self.inner(*args, **kwargs)
        if place.done and not torch.compiler.is_compiling():
            raise ModelExecError("an attention was run twice in one call of the model; such a model cannot be cached")
        if place.skip:
            output = self._skipped()
        else:
            output = self.inner(*args, **kwargs)
            self._computed(output)
        place.done = True
        return output

    def _skipped(self) -> Any:
        place = self.place
        if place.prediction is None and place.predict is not None:
            place.prediction = place.predict()
        predicted, place.prediction = place.prediction or (), None
        return predicted[0] if place.bare else predicted

    def _computed(self, output: Any) -> None:
        place = self.place
        place.bare = isinstance(output, Tensor)
        place.value = tuple(tensor.detach() for tensor in unpack(output))
        if torch.compiler.is_compiling():
            place.traced = True
            place.value = tuple(tensor.clone() for tensor in place.value)  # the block may go on to write into it
        elif place.keep is not None:
            place.keep(place)


def _plus(negative: Streams, streams: Streams) -> Streams:
    """Add streams to the negatives of what they were, in place where the dtype allows it."""
    if [tensor.shape for tensor in negative] != [tensor.shape for tensor in streams]:
        raise ModelExecError(
            f"the streams are {[list(tensor.shape) for tensor in negative]} before the blocks and "
            f"{[list(tensor.shape) for tensor in streams]} after them; a change can be cached where the shape stays"
        )
    return tuple(was.to(now.dtype).add_(now.detach()) for was, now in zip(negative, streams, strict=True))
