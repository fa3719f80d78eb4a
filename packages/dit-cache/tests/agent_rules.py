"""The rules of the cache restated as plain loops over steps and blocks, and the tiny stacks that it is tried on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dit_cache.agent import CacheAgent, CacheConfig

WIDTH = 6


def honoured(config: CacheConfig, legacy: bool) -> bool:
    """Whether step_end means anything."""
    return not (legacy and config.method == "dit_block_cache")


def nothing_cached(c: CacheConfig) -> bool:
    return (
        c.step_interval == 1
        or c.step_start >= c.steps_count
        or c.step_start == c.step_end
        or c.block_start >= c.blocks_count
        or c.block_start == c.block_end
    )


def reused(c: CacheConfig, step: int, block: int, legacy: bool = False) -> bool:
    """Whether the call of one block in one step is skipped."""
    if nothing_cached(c) or step <= c.step_start or (step - c.step_start) % c.step_interval == 0:
        return False
    if honoured(c, legacy) and step > c.step_end:
        return False
    return c.method == "attention_cache" or c.block_start <= block < c.block_end


def naive(c: CacheConfig, blocks: list[nn.Module], inputs: list[Tensor], legacy: bool = False) -> list[Tensor]:
    """The result of each step: every delta and every output is written down, and looked up where the rule says so."""
    kept: dict[int, Tensor] = {}
    results = []
    for step, x in enumerate(inputs):
        entry = x
        for block, module in enumerate(blocks):
            is_reused = reused(c, step, block, legacy)
            if c.method == "attention_cache":
                out = kept[block] if is_reused else module(x)
                if not is_reused:
                    kept[block] = out
                x = x + out
                continue
            if block == c.block_start:
                entry = x
                x = x + kept[0] if is_reused else x
            x = x if is_reused else module(x)
            if block == min(c.block_end, c.blocks_count) - 1 and not is_reused:
                kept[0] = x - entry
        results.append(x)
    return results


def run(agent: CacheAgent, c: CacheConfig, blocks: list[nn.Module], inputs: list[Tensor]) -> list[Tensor]:
    """The same loop through an agent."""
    results = []
    for x in inputs:
        for module in blocks:
            out = agent.apply(module, hidden_states=x)
            x = x + out if c.method == "attention_cache" else out
        results.append(x)
    return results


class Block(nn.Module):
    """hidden + tanh(linear(hidden)), or without the hidden as attention would be; counts its calls."""

    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.residual = residual
        self.called = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.called += 1
        out: Tensor = self.linear(hidden_states).tanh()
        return hidden_states + out if self.residual else out


def stack(config: CacheConfig, seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [Block(config.method == "dit_block_cache").requires_grad_(False) for _ in range(config.blocks_count)]


def latents(steps: int, seed: int = 1, shape: tuple[int, ...] = (2, 3, WIDTH)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(steps)]


def changed(config: CacheConfig, **values: Any) -> CacheConfig:
    """The config with other values, whatever their type."""
    return replace(config, **values)


@st.composite
def configs(draw: st.DrawFn, *, default_end: bool = True) -> CacheConfig:
    """Legal configurations, the bypassing ones included."""
    blocks, steps = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    start = draw(st.integers(0, steps + 1))
    block_start = draw(st.integers(0, blocks))
    block_end = draw(st.integers(block_start, blocks))
    return CacheConfig(
        draw(st.sampled_from(["attention_cache", "dit_block_cache"])),
        blocks,
        steps,
        step_start=start,
        step_interval=draw(st.integers(1, 5)),
        step_end=draw(st.one_of(st.integers(start, steps + 3), st.just(10_000))),
        block_start=block_start,
        block_end=draw(st.sampled_from([block_end, 10_000])) if default_end else block_end,
    )
