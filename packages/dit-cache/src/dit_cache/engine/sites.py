"""The interception of a module.

An instance attribute stands in front of the module's `forward`: the module keeps its place, its name and its
parameters, and its model may go on indexing whatever it has for each block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from dit_cache.errors import ConfigError

compiler: Any = torch.compiler  # whose functions have no annotations
_COMPILED = "_compiled_call_impl"  # where `Module.compile` puts what is called in place of the module


class Site:
    """The interception of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Callable[..., Any] = module.forward
        self._attribute = ""
        self._before: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the forward of the module."""
        raise NotImplementedError

    def check(self) -> None:
        """Make sure that no other stands here.

        Raises:
            ConfigError: a cache is attached already.
        """
        held = (vars(self.module).get(name) for name in ("forward", _COMPILED))
        if any(isinstance(getattr(function, "__self__", None), Site) for function in held):
            raise ConfigError("a cache is attached to this model already; detach() it first")

    def install(self) -> None:
        """Step in front of the module; outside of what is compiled where it was compiled by itself."""
        held = vars(self.module)
        self._attribute = "forward" if held.get(_COMPILED) is None else _COMPILED
        self.inner = getattr(self.module, self._attribute)
        self._before = held.get(self._attribute)
        held[self._attribute] = self.forward

    def follow(self) -> None:
        """Step outside where the module was compiled after it was intercepted: one graph then serves all blocks."""
        compiled = vars(self.module).get(_COMPILED)
        if compiled is not None and compiled != self.forward:
            if self._attribute == "forward":
                self.remove()
            self.install()

    def remove(self) -> None:
        """Put back what was there."""
        if self._before is None:
            del vars(self.module)[self._attribute]
        else:
            vars(self.module)[self._attribute] = self._before

    @property
    def covered(self) -> bool:
        """Whether somebody else stepped in front since."""
        return vars(self.module).get(self._attribute) != self.forward

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConfigError("a model with a cache attached cannot be copied or pickled; detach() the cache first")
