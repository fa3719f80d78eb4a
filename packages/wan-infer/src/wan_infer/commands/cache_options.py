"""The options that leave out work: those of Wan2.1 on Ascend, and schedules."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wan_infer.errors import RequestError

if TYPE_CHECKING:
    from wan_infer.pipeline import WanPipeline

_DEFAULTS = {"start_step": 12, "attentioncache_interval": 4, "end_step": 37}  # those of Wan2.1 on Ascend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of these options."""
    group = parser.add_argument_group("what is not computed")
    group.add_argument(
        "--cache",
        metavar="SCHEDULE",
        help="a schedule of `dit-cache search`; or auto:SHARE, such as auto:0.4 for 40 %% of the steps, which searches "
        "one for these settings the first time and keeps it",
    )
    group.add_argument("--use_attentioncache", action="store_true", help="use outputs of self-attention again")
    group.add_argument("--start_step", type=int, help="the first step whose outputs are kept (default: 12)")
    group.add_argument("--attentioncache_interval", type=int, help="one in so many steps is computed (default: 4)")
    group.add_argument("--end_step", type=int, help="the last step that uses kept outputs (default: 37)")


def check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is opened.

    Raises:
        RequestError: options contradict each other, or the schedule cannot be read.
    """
    given = [name for name in _DEFAULTS if getattr(options, name) is not None]
    if given and not options.use_attentioncache:
        raise RequestError(f"--{given[0]} has no effect without --use_attentioncache; add it")
    if options.cache is not None and options.use_attentioncache:
        raise RequestError("both --cache and --use_attentioncache were given; give one of them")
    if options.cache is not None:
        from wan_infer.caching import read_wish

        read_wish(options.cache)


def arguments(options: argparse.Namespace, pipe: WanPipeline, steps: int) -> dict[str, Any]:
    """Return the arguments of a call of the pipeline.

    Raises:
        RequestError: numbers of the attention cache are not possible.
    """
    if options.use_attentioncache:
        from wan_infer.caching import attention_cache

        numbers = {name: _DEFAULTS[name] if value is None else value for name, value in _numbers(options).items()}
        start, interval, end = numbers.values()
        cache = attention_cache(pipe.config.num_layers, steps, start=start, interval=interval, end=end)
        if start >= steps or interval == 1 or start == end:
            sys.stderr.write(
                f"note: from step {start}, one in {interval}, to {end}: that leaves out nothing of {steps}\n"
            )
        return {"cache": cache}
    from wan_infer.caching import on_terminal

    return {"cache": options.cache, "on_search": on_terminal()}


@contextmanager
def notes() -> Iterator[None]:
    """Say in one line each what a cache warns about."""
    from wan_infer.caching import Unverified

    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, Unverified):
                sys.stderr.write(f"note: {message}\n")
            else:
                shown(message, category, *place, **more)

        warnings.showwarning = show
        yield


def described(options: argparse.Namespace) -> dict[str, Any] | str | None:
    """Return what the record of a video says of these options."""
    if not options.use_attentioncache:
        return None if options.cache is None else str(options.cache)
    return {name: _DEFAULTS[name] if value is None else value for name, value in _numbers(options).items()}


def _numbers(options: argparse.Namespace) -> dict[str, int | None]:
    return {name: getattr(options, name) for name in _DEFAULTS}
