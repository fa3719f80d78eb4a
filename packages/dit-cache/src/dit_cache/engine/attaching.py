"""A cache put into a model, by one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn
from torch.distributed import ProcessGroup

from dit_cache.engine.blocks import BlockCache, Signal
from dit_cache.engine.finding import find_attention, find_blocks
from dit_cache.engine.protocols import Guard, Policy, Predictor, Store
from dit_cache.engine.regions import Output, Place, Stretch
from dit_cache.engine.watched import Watched
from dit_cache.errors import ConfigError

What = Literal["stack", "range", "attention"]


def attach(
    models: nn.Module | Sequence[nn.Module],
    policy: Policy,
    *,
    what: What = "stack",
    blocks: str | None = None,
    between: tuple[int, int] | None = None,
    attention: str | None = None,
    streams: Sequence[str] | None = None,
    branches: Sequence[str] = ("",),
    steps: int | Sequence[float] | None = None,
    signal: Signal | None = None,
    predictor: Predictor | None = None,
    store: Store | None = None,
    guards: Sequence[Guard] = (),
    group: ProcessGroup | None = None,
    measure: bool = False,
) -> BlockCache:
    """Put a cache into a model that has a list of blocks; `BlockCache.detach` takes it out again.

    A policy that looks at a probe decides on the way: its first and last blocks are always computed, and the stretch
    that is cached is what lies between.

    Args:
        models: the model; or several that share the steps of one generation, such as experts of high and low noise.
        policy: when to compute.
        what: "stack": the change over all blocks, "range": over those in `between`, "attention": each output.
        blocks: path of the list of blocks; the longest list of modules of one class when None.
        between: from this block up to that one, which is not in it any more; blocks count from 0.
        attention: name of the attention in a block; ``self_attn``, ``attn1`` or ``attn`` when None.
        streams: names of those arguments of a block that it returns, in that order; found by their shapes when None.
        branches: sides of the guidance, in the order in which the model is called for them in each step.
        steps: noise levels or number of steps of each generation, where calls are to be counted without `generation`.
        signal: ``signal(model, *args, **kwargs)`` returns what stands for the timestep in a call of the model.
        predictor, store, guards, group, measure: as those of `Cache`.

    Raises:
        ConfigError: blocks or attentions are not found, or the arguments do not go together.
    """
    listed = [models] if isinstance(models, nn.Module) else list(models)
    probe = "probe" in policy.needs
    if what not in get_args(What) or (what != "attention" and (what == "range") != (between is not None)):
        raise ConfigError(
            f'what is {what!r} and between is {between}; legal are "stack" without between, "range" with it, and '
            '"attention" with or without it'
        )
    if probe and what != "stack":
        raise ConfigError(f'{type(policy).__name__} decides which blocks are cached: what has to be "stack"')
    watched = []
    for number, model in enumerate(listed):
        found = find_blocks(model, blocks)
        start, end = _bounds(policy if probe else None, between, len(found))
        if what == "attention":
            modules = find_attention(found[start:end], attention)
            places: list[Place] = [Output(f"{number}.{n}", module) for n, module in enumerate(modules, start)]
        else:
            places = [Stretch(f"{number}", found, (start, end), streams=streams, probe=probe)]
        watched.append(Watched(model, places))
    return BlockCache(
        watched, policy, branches=branches, steps=steps, signal=signal, predictor=predictor, store=store, guards=guards,
        group=group, measure=measure,
    )  # fmt: skip


def _bounds(policy: Policy | None, between: tuple[int, int] | None, length: int) -> tuple[int, int]:
    start, end = between or (0, length)
    if policy is not None:
        start, end = getattr(policy, "first", 1), length - getattr(policy, "last", 0)
        if start < 1:
            raise ConfigError(f"first is {start}; a probe takes at least one block")
    if not 0 <= start < end <= length:
        raise ConfigError(f"blocks from {start} up to {end} were asked for; the model has {length}, counted from 0")
    return start, end
