"""What is cached and when: the configuration, its checks, and the decisions that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dit_cache.errors import ConfigError

ATTENTION, BLOCKS = "attention_cache", "dit_block_cache"
NO_END = 10_000

_MINIMA = {"blocks_count": 1, "steps_count": 1, "step_start": 0, "step_interval": 1, "block_start": 0}
_ORDERED = (("step_end", "step_start"), ("block_end", "block_start"))


@dataclass(frozen=True)
class CacheConfig:
    """What is cached and when; steps and blocks count from 0. `CacheAgent` checks it, the class itself does not.

    Args:
        method: "attention_cache" keeps the output of each call and returns it in place of the next ones;
            "dit_block_cache" keeps by how much a range of blocks changed its input, and adds that instead of
            computing the range.
        blocks_count: calls of `CacheAgent.apply` in one step of one branch.
        steps_count: steps of one generation.
        step_start: the first step whose results are kept.
        step_interval: every how many steps, from step_start on, all is computed; 1 caches nothing.
        step_end: the last step that may use what is kept.
        block_start: first block of the range; "attention_cache" caches all blocks.
        block_end: the block after the last one of the range; 10000, the default, is the end of the model.
    """

    method: str
    blocks_count: int
    steps_count: int
    step_start: int = 0
    step_interval: int = 1
    step_end: int = NO_END
    block_start: int = 0
    block_end: int = NO_END


def check(config: CacheConfig, *, legacy: bool = False) -> None:
    """Raise ConfigError for a configuration that cannot be used; `legacy` refuses the default block_end for blocks."""
    if not isinstance(config, CacheConfig):
        raise ConfigError(f"The config must be a dit_cache.CacheConfig, but got {type(config).__name__}.")
    if config.method not in (ATTENTION, BLOCKS):
        raise ConfigError(
            f"Method '{config.method}' is not supported, the list of support methods is ['{ATTENTION}', '{BLOCKS}']."
        )
    for name in (field.name for field in fields(config) if field.name != "method"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"The '{name}' in config must be an int, but got {value!r} of {type(value).__name__}.")
    for name, least in _MINIMA.items():
        if getattr(config, name) < least:
            bound = "> 0" if least else ">= 0"
            raise ConfigError(f"The '{name}' in config must {bound}, but got {getattr(config, name)}.")
    for end, start in _ORDERED:
        if getattr(config, end) < getattr(config, start):
            raise ConfigError(
                f"The '{end}' must >= '{start}', but got {getattr(config, end)} and {getattr(config, start)}."
            )
    to_the_end = config.block_end == NO_END and not legacy
    if config.method == BLOCKS and config.block_end > config.blocks_count and not to_the_end:
        remedy = f" Give block_end={config.blocks_count} for all blocks." if config.block_end == NO_END else ""
        raise ConfigError(
            f"The 'block_end' must <= 'blocks_count', but got {config.block_end} and {config.blocks_count}.{remedy}"
        )


def bypassed(config: CacheConfig) -> bool:
    """Whether nothing is cached at all, so that a call is nothing but the call."""
    return (
        config.step_start >= config.steps_count
        or config.step_end == config.step_start
        or config.block_start >= config.blocks_count
        or config.block_end == config.block_start
        or config.step_interval == 1
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The decisions of one generation.

    Steps start, start + interval, … are computed and kept; those between are reused, up to and including `end`.
    """

    steps: int
    start: int
    interval: int
    end: int
    blocks: int
    block_start: int
    block_end: int

    @classmethod
    def of(cls, config: CacheConfig, *, steps: int | None = None, legacy: bool = False) -> Plan:
        """Make the plan of a generation of `steps` steps, by default `config.steps_count`.

        For another number of steps, start and end keep their place in the generation: the start is rounded up and the
        end down, so that no part is cached that was not. The interval stays.
        """
        steps = config.steps_count if steps is None else steps
        end = (config.step_end + 1) * steps // config.steps_count - 1
        if legacy and config.method == BLOCKS:
            end = steps - 1
        return cls(
            steps=steps,
            start=-(-config.step_start * steps // config.steps_count),
            interval=config.step_interval,
            end=min(end, steps - 1),
            blocks=config.blocks_count,
            block_start=config.block_start,
            block_end=min(config.block_end, config.blocks_count),
        )

    def refreshes(self, step: int) -> bool:
        """Whether the step lies on the grid of those that are computed to be kept."""
        return step >= self.start and (step - self.start) % self.interval == 0

    def serves(self, kept_at: int, step: int) -> bool:
        """Whether what was kept at one step is what `step` may use: nothing computed before the latest refresh is."""
        return step <= self.end and kept_at == step - (step - self.start) % self.interval

    def reuses(self, step: int) -> bool:
        """Whether the step uses what was kept."""
        return self.start < step <= self.end and not self.refreshes(step)

    def keeps(self, step: int) -> bool:
        """Whether what the step computes is used later."""
        return self.refreshes(step) and self.reuses(step + 1)

    def last_reuse(self, step: int) -> bool:
        """Whether what `step` uses is used no more afterwards."""
        return not self.reuses(step + 1)
