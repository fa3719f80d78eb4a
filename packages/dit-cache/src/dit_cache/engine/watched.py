"""One model that is watched, and one call of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dit_cache.engine.cache import _Branch
from dit_cache.engine.moment import Decision, Evidence, Moment
from dit_cache.engine.regions import Place
from dit_cache.engine.sites import Site
from dit_cache.errors import ConfigError

Shapes = dict[str, tuple[int, ...]]


@dataclass(eq=False)
class Watched:
    """One model. What is read in its hooks are plain attributes, because they may be compiled with it.

    Attributes:
        model: the model.
        places: what is cached in it.
        idle: whether no generation is going on, and none begins by itself.
        decided: whether the decision on the next call fell before it.
        ran: whether it was called since.
    """

    model: nn.Module
    places: list[Place]
    idle: bool = True
    decided: bool = False
    ran: bool = False
    _handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """All interceptions."""
        return [site for place in self.places for site in place.sites]

    def reset(self) -> None:
        """Forget the call."""
        self.decided = self.ran = False
        for place in self.places:
            place.reset()

    def check(self) -> None:
        """Make sure that `install` can be done.

        Raises:
            ConfigError: a cache is attached to one of the blocks already.
        """
        for site in self.sites:
            site.check()

    def install(self, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Step in front of the blocks; have the hooks called around the model."""
        for site in self.sites:
            site.install()
        self._handles = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, always_call=True),
        ]

    def remove(self) -> None:
        """Undo `install`, once.

        Raises:
            ConfigError: something else stepped in front of a block since; nothing was done then.
        """
        if not self._handles:
            return
        if covered := next((site for site in self.sites if site.covered), None):
            name = type(covered.module).__name__
            raise ConfigError(f"the forward of {name} was replaced after the cache was attached; put that back first")
        for site in self.sites:
            site.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass(kw_only=True, eq=False)
class Call:
    """One call of a model that is going on.

    Attributes:
        at, side: the moment.
        explicit: whether the moment was said; counted otherwise.
        watched: the model, once that is known.
        seen: what may be looked at.
        decision: what was decided, once that is known.
        errors: of the predictions that a hole would have had here.
    """

    at: Moment
    side: _Branch
    explicit: bool
    watched: Watched | None = None
    seen: Evidence = field(default_factory=Evidence)
    decision: Decision | None = None
    errors: list[float] = field(default_factory=list)


def device_of(model: nn.Module, values: Iterable[Any] = ()) -> torch.device:
    """Where a model computes: its largest argument is there; its parameters need not be, before it is called."""
    given = [value for value in values if isinstance(value, Tensor)] or list(itertools.islice(model.parameters(), 1))
    return max(given, key=Tensor.numel).device if given else torch.device("cpu")


def shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    """Return the shape of every tensor that a model is called with."""
    given = (*enumerate(args), *kwargs.items())
    return {str(name): tuple(value.shape) for name, value in given if isinstance(value, Tensor)}
