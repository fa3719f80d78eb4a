"""Skips what hardly changes between the denoising steps of a diffusion transformer, and knows what it costs.

At the solver, with a schedule that was found for a model; a predicted step costs nothing::

    cache = Schedule.load("wan-0.4.json").cache()
    with cache.generation(sigmas):
        for timestep in timesteps:
            velocity = cache.velocity(lambda: guided(model, latents, timestep), latents)
            latents = solver(velocity, latents)

Found, for a share of the steps, from the same loop as a function of samples and a cache::

    schedule = search(run, sigmas=sigmas, budget=0.4, calibration=samples[:8], validation=samples[8:])

Inside any model with a list of blocks, by one call::

    with attach(model, FirstBlock(0.1), guards=[Limits(first=3)], branches=("cond", "uncond"), steps=50):
        video = pipeline(prompt)

As in MindIE SD::

    agent = CacheAgent(CacheConfig("dit_block_cache", 40, 50, step_start=20, step_interval=2, step_end=47, …))
    x = agent.apply(block, hidden_states=x, vec=vec)

A cache is put together from four answers: a policy (when), a predictor (what instead), a store (where), guards (when
after all). What happened is in ``cache.ledger``; what it did to a video says `compare`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_cache.agent import CacheAgent, CacheConfig, StepCalls
    from dit_cache.engine.attaching import attach
    from dit_cache.engine.blocks import BlockCache
    from dit_cache.engine.gates import TEACACHE_WAN, EasyCache, FirstBlock, TeaCache
    from dit_cache.engine.guards import Envelope, Limits
    from dit_cache.engine.magnitude import MagCache, MagCalibration, MagRatios
    from dit_cache.engine.moment import Decision, Evidence, Moment
    from dit_cache.engine.policies import Always, Interval, Static
    from dit_cache.engine.predictors import Offset, Planned, Reuse, Secant, Taylor
    from dit_cache.engine.protocols import Guard, Policy, Predictor, Store, Weights
    from dit_cache.engine.store import Keep
    from dit_cache.engine.velocity import VelocityCache
    from dit_cache.errors import (
        CacheError,
        CacheWarning,
        ComparisonError,
        ConfigError,
        GenerationError,
        ModelExecError,
        ParametersInvalid,
        PlotError,
        PlotUnavailable,
        ScheduleError,
        ScheduleMismatch,
        SearchError,
    )
    from dit_cache.meter.compare import Comparison, Scores, compare
    from dit_cache.meter.flops import FlopMeter, flops_share
    from dit_cache.meter.ledger import Entry, Ledger
    from dit_cache.meter.plots import plot_front
    from dit_cache.schedule import Made, Schedule, model_digest
    from dit_cache.searcher.block_cache import BlockCacheFound, Tried, search_block_cache
    from dit_cache.searcher.progress import Progress, TerminalWatch, Watch
    from dit_cache.searcher.searching import Front, search, search_front

# Where each public name lives; torch is imported when the first of them is used.
_HOMES = {
    "Schedule": "schedule",
    "Made": "schedule",
    "model_digest": "schedule",
    "search": "searcher.searching",
    "search_front": "searcher.searching",
    "Front": "searcher.searching",
    "search_block_cache": "searcher.block_cache",
    "BlockCacheFound": "searcher.block_cache",
    "Tried": "searcher.block_cache",
    "Progress": "searcher.progress",
    "Watch": "searcher.progress",
    "TerminalWatch": "searcher.progress",
    "VelocityCache": "engine.velocity",
    "attach": "engine.attaching",
    "BlockCache": "engine.blocks",
    "CacheConfig": "agent",
    "CacheAgent": "agent",
    "StepCalls": "agent",
    "Always": "engine.policies",
    "Static": "engine.policies",
    "Interval": "engine.policies",
    "TeaCache": "engine.gates",
    "TEACACHE_WAN": "engine.gates",
    "EasyCache": "engine.gates",
    "MagCache": "engine.magnitude",
    "MagCalibration": "engine.magnitude",
    "MagRatios": "engine.magnitude",
    "FirstBlock": "engine.gates",
    "Reuse": "engine.predictors",
    "Taylor": "engine.predictors",
    "Secant": "engine.predictors",
    "Offset": "engine.predictors",
    "Planned": "engine.predictors",
    "Keep": "engine.store",
    "Limits": "engine.guards",
    "Envelope": "engine.guards",
    "Policy": "engine.protocols",
    "Predictor": "engine.protocols",
    "Store": "engine.protocols",
    "Guard": "engine.protocols",
    "Weights": "engine.protocols",
    "Moment": "engine.moment",
    "Evidence": "engine.moment",
    "Decision": "engine.moment",
    "Ledger": "meter.ledger",
    "Entry": "meter.ledger",
    "FlopMeter": "meter.flops",
    "flops_share": "meter.flops",
    "compare": "meter.compare",
    "Comparison": "meter.compare",
    "Scores": "meter.compare",
    "plot_front": "meter.plots",
    "CacheError": "errors",
    "ConfigError": "errors",
    "ParametersInvalid": "errors",
    "ModelExecError": "errors",
    "GenerationError": "errors",
    "ScheduleError": "errors",
    "ScheduleMismatch": "errors",
    "SearchError": "errors",
    "ComparisonError": "errors",
    "PlotError": "errors",
    "PlotUnavailable": "errors",
    "CacheWarning": "errors",
}

__all__ = [
    "Schedule",
    "Made",
    "model_digest",
    "search",
    "search_front",
    "Front",
    "search_block_cache",
    "BlockCacheFound",
    "Tried",
    "Progress",
    "Watch",
    "TerminalWatch",
    "VelocityCache",
    "attach",
    "BlockCache",
    "CacheConfig",
    "CacheAgent",
    "StepCalls",
    "Always",
    "Static",
    "Interval",
    "TeaCache",
    "TEACACHE_WAN",
    "EasyCache",
    "MagCache",
    "MagCalibration",
    "MagRatios",
    "FirstBlock",
    "Reuse",
    "Taylor",
    "Secant",
    "Offset",
    "Planned",
    "Keep",
    "Limits",
    "Envelope",
    "Policy",
    "Predictor",
    "Store",
    "Guard",
    "Weights",
    "Moment",
    "Evidence",
    "Decision",
    "Ledger",
    "Entry",
    "FlopMeter",
    "flops_share",
    "compare",
    "Comparison",
    "Scores",
    "plot_front",
    "CacheError",
    "ConfigError",
    "ParametersInvalid",
    "ModelExecError",
    "GenerationError",
    "ScheduleError",
    "ScheduleMismatch",
    "SearchError",
    "ComparisonError",
    "PlotError",
    "PlotUnavailable",
    "CacheWarning",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
