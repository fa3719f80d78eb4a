"""The agent: which step and block a call belongs to, and what becomes of a generation that does not go as planned.

What MindIE SD 3.1 does that is surprising, and what is done here:

| MindIE SD, "dit_block_cache"                               | here                          | `legacy=True` |
|------------------------------------------------------------|-------------------------------|---------------|
| ignores `step_end`                                         | honoured                      | ignored       |
| refuses the default `block_end`                            | the end of the model          | refused       |
| a range of one block: its input is added, not its change   | its change is added           | as here       |
| blocks that overwrite their input: nothing is added        | their change is added         | as here       |
| passes streams by position, or by keyword with interval 1  | one rule for both: `calling`  | as here       |
| each skipped block launches an addition                    | returns its input itself      | as here       |
| a block that returns a tuple of one raises TypeError       | a tuple of one comes back     | as here       |

| MindIE SD, both methods                                    | here                          | `legacy=True` |
|------------------------------------------------------------|-------------------------------|---------------|
| writing into an attention output changes what is reused    | each caller has its own       | as here       |
| tensors are held until the generation ends                 | until their last use          | as here       |
| an exception shifts all later generations                  | the agent starts afresh       | as here       |
| what was kept is applied to another shape                  | starts afresh with a warning  | as here       |
| a number that is no int: used as it is, or TypeError       | ConfigError                   | as here       |

`legacy` restores decisions, never what corrupts a result.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_cache.agent.attention import AttentionOutputs
from dit_cache.agent.block_range import BlockRange
from dit_cache.agent.calling import ENCODER, HIDDEN, call
from dit_cache.agent.config import BLOCKS, CacheConfig, Plan, bypassed, check
from dit_cache.errors import CacheWarning, ConfigError, GenerationError, ParametersInvalid

_NOT_YET = -1
_TWO_BRANCHES = (
    "If one agent serves the conditional and the unconditional pass, make it with branches=('cond', 'uncond')."
)


@dataclass(frozen=True, kw_only=True)
class StepCalls:
    """How many calls of one step and branch were computed and how many skipped."""

    step: int
    branch: str
    computed: int
    skipped: int


class _Branch:
    """One branch's place in the generation, and what it keeps."""

    def __init__(self, config: CacheConfig, plan: Plan) -> None:
        self.kept = (BlockRange if config.method == BLOCKS else AttentionOutputs)(plan)
        self.step, self.block = _NOT_YET, 0
        self.shapes: dict[str, torch.Size] = {}


class CacheAgent:
    """Calls blocks, or returns what stands for them.

    The agent counts calls: each one is the next block, `blocks_count` of them are a pass, and a pass of each branch is
    a step. It serves one generation at a time, in one thread. After a whole generation the next call begins a new one.

    A generation that ends early, without an exception inside `apply`, leaves no trace that the agent could see: run
    generations inside `generation()`, or call `reset()`. Likewise, that one branch was declared and two are served
    can be seen inside `generation()` only.

    Args:
        config: what is cached and when.
        legacy: for "dit_block_cache", ignore `step_end` and refuse the default `block_end`, as MindIE SD 3.1 does.
        branches: names of the passes of one step that keep their tensors apart, or how many there are. Outside
            `branch()` a pass belongs to the branch after that of the previous pass, in this order.

    Raises:
        ConfigError: the configuration, or `branches`, cannot be used.
    """

    def __init__(self, config: CacheConfig, *, legacy: bool = False, branches: int | Sequence[str] = 1) -> None:
        check(config, legacy=legacy)
        self._config, self._legacy = config, legacy
        self._names = _names(branches)
        self._bypassed = bypassed(config)
        self._calls: dict[tuple[int, str], list[int]] = {}
        self._named: str | None = None  # inside branch()
        self._inside = False  # of generation()
        self._owner: dict[str, int] = {}  # the thread of the generation; a dict, for its atomic setdefault
        self._plan = self._usual = Plan.of(config, legacy=legacy)
        self._first = 0  # step of a generation
        self.reset()

    def reset(self) -> None:
        """Drop all tensors; the next call, from any thread, is block 0 of the first step."""
        self._restart()
        self._failed = False
        self._owner.clear()

    def _restart(self) -> None:
        self._branches = {name: _Branch(self._config, self._plan) for name in self._names}
        self._step = self._first
        self._turn = 0
        self._by_name: bool | None = None

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` with the arguments, or return what stands for its result.

        "dit_block_cache" needs `hidden_states` (any shape, the same in all blocks of the range), and for blocks with
        two outputs `encoder_hidden_states`, as keywords; the block returns hidden_states, or the pair (hidden_states,
        encoder_hidden_states) of the same shapes. When the configuration caches nothing, all is passed on unchecked.

        An exception, the block's own included, resets the agent.

        Raises:
            ParametersInvalid: `function` is not callable, or the tensors that are needed are missing.
            ModelExecError: what a block returned cannot be kept.
            GenerationError: the call does not fit the generation: another thread, more steps than declared, branches
                mixed up, or a call after an exception in the same `generation()`.
        """
        if not callable(function):
            raise ParametersInvalid("Input function must be callable.")
        if self._bypassed:
            return call(function, args, kwargs) if self._config.method == BLOCKS else function(*args, **kwargs)
        self._claim()
        try:
            return self._counted(function, args, kwargs)
        except BaseException:
            inside = self._inside
            self.reset()
            self._failed = inside
            raise

    def _counted(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, branch = self._next()
        if self._other_shape(branch, args, kwargs):
            name, branch = self._next()
            self._other_shape(branch, args, kwargs)
        result, computed = branch.kept.run(branch.step, branch.block, function, args, kwargs)
        self._calls.setdefault((branch.step, name), [0, 0])[0 if computed else 1] += 1
        branch.block += 1
        if branch.block == self._config.blocks_count:
            self._end_pass(branch)
        return result

    def _next(self) -> tuple[str, _Branch]:
        """Return the branch of this call; begin its pass, its step and the generation where one is due."""
        if self._failed:
            raise GenerationError("An exception ended this generation: leave generation(), or call reset().")
        by_name = self._named is not None
        if self._by_name not in (None, by_name) and len(self._names) > 1:
            raise GenerationError("Calls inside and outside of branch() are mixed: name the branch of every call.")
        name = self._names[self._turn] if self._named is None else self._named
        branch = self._branches[name]
        if branch.block == 0:
            if branch.step == self._step:
                self._begin_step()
                branch = self._branches[name]
            if all(each.step == _NOT_YET for each in self._branches.values()):
                self._calls = {}
            branch.step = self._step
        self._by_name = by_name
        return name, branch

    def _begin_step(self) -> None:
        self._step += 1
        if self._step == self._plan.steps:
            if self._inside:
                raise GenerationError(
                    f"The generation was to have {self._plan.steps} steps of {self._config.blocks_count} block calls, "
                    f"and one more came: give generation(steps=…) their number. {_TWO_BRANCHES}"
                )
            self._restart()
        for branch in self._branches.values():
            if branch.block == 0:
                branch.kept.expire(self._step)

    def _end_pass(self, branch: _Branch) -> None:
        branch.block = 0
        if not self._by_name:
            self._turn = (self._turn + 1) % len(self._names)
        if self._complete():
            for each in self._branches.values():
                each.kept.clear()
                each.shapes.clear()
            if not self._inside:
                self._owner.clear()

    def _complete(self) -> bool:
        started = [branch for branch in self._branches.values() if branch.step != _NOT_YET]
        last = self._plan.steps - 1
        return bool(started) and all(branch.step == last and branch.block == 0 for branch in started)

    def _other_shape(self, branch: _Branch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the shapes say that a new generation has begun; then the agent has been restarted."""
        shapes = self._watched(branch, args, kwargs)
        changed = [name for name, shape in shapes.items() if branch.shapes.get(name, shape) != shape]
        if not changed:
            branch.shapes.update(shapes)
            return False
        name = changed[0]
        message = (
            f"The shape of {name} changed from {list(branch.shapes[name])} to {list(shapes[name])} in step "
            f"{branch.step} of {self._plan.steps}, block {branch.block} of {self._config.blocks_count}"
        )
        unlike = self._config.method != BLOCKS and len(set(branch.shapes.values())) > 1
        if self._inside or unlike:
            raise GenerationError(f"{message}. Enter generation(), or call reset(), where a generation begins.")
        self._restart()
        warnings.warn(
            f"{message}: this is taken for the first block of a new generation. {_TWO_BRANCHES}",
            CacheWarning,
            stacklevel=4,
        )
        return True

    def _watched(self, branch: _Branch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Size]:
        """Return the shapes that stay the same in one generation."""
        if self._config.method == BLOCKS:
            streams = {name: kwargs.get(name) for name in (HIDDEN, ENCODER)}
        else:  # the calls of one step may differ: each is compared with its own in the step before
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            streams = {f"the first tensor of block {branch.block}": next(tensors, None)}
        return {name: value.shape for name, value in streams.items() if isinstance(value, Tensor)}

    @contextmanager
    def generation(self, steps: int | None = None, *, first_step: int = 0) -> Iterator[CacheAgent]:
        """One generation: begins afresh, and whatever happens leaves nothing behind.

        Args:
            steps: how many steps it has when not `steps_count`; `step_start` and `step_end` then keep their place in
                the generation, the start rounded up and the end down.
            first_step: the step it begins with, for one that denoises only the last steps of a schedule.

        Raises:
            GenerationError: on entering, when a generation runs in another thread or there is one already; inside, at
                a call too many.

        Warns:
            CacheWarning: on leaving without an exception, when steps or blocks are missing.
        """
        if self._inside:
            raise GenerationError("A generation is running already: generation() cannot be nested.")
        total = self._config.steps_count if steps is None else steps
        if total < 1 or not 0 <= first_step < total:
            raise GenerationError(f"steps={total} and first_step={first_step}: legal are 0 <= first_step < steps.")
        self._claim()
        self._plan, self._first = Plan.of(self._config, steps=steps, legacy=self._legacy), first_step
        self._restart()
        self._failed, self._inside = False, True
        try:
            yield self
            missing = None if self._bypassed or self._failed or self._complete() else self._place()
        finally:
            self._inside = False
            self._plan, self._first = self._usual, 0
            self.reset()
        if missing:
            warnings.warn(missing, CacheWarning, stacklevel=3)

    def _place(self) -> str:
        reached = [
            f"{f'branch {name!r} ' if name else ''}step {branch.step} and block {branch.block}"
            for name, branch in self._branches.items()
            if branch.step != _NOT_YET
        ]
        return (
            f"The generation ended before its {self._plan.steps} steps of {self._config.blocks_count} block calls: "
            f"{', '.join(reached) or 'no call'} came last. If it has fewer, give generation(steps=…)."
        )

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Calls inside belong to the branch of this name.

        A branch may be left out in some steps: it computes what it has not kept since the last refresh.

        Raises:
            GenerationError: the name was not declared, or another thread runs a generation.
        """
        if name not in self._names:
            raise GenerationError(
                f"The branch {name!r} was not declared; declared are {', '.join(map(repr, self._names))}. "
                f"Give CacheAgent all names as branches=(…)."
            )
        self._refuse_other_thread(self._owner.get("thread"))
        before, self._named = self._named, name
        try:
            yield
        finally:
            self._named = before

    def _claim(self) -> None:
        self._refuse_other_thread(self._owner.setdefault("thread", threading.get_ident()))

    def _refuse_other_thread(self, owner: int | None) -> None:
        if owner not in (None, threading.get_ident()):
            raise GenerationError(
                f"Thread {owner} is in the middle of a generation with this agent: give each thread an agent of its "
                f"own, and call reset() if that generation was given up."
            )

    @property
    def calls(self) -> tuple[StepCalls, ...]:
        """Calls by step and branch, of the generation that runs or ran last; empty when nothing is cached at all."""
        return tuple(
            StepCalls(step=step, branch=branch, computed=computed, skipped=skipped)
            for (step, branch), (computed, skipped) in self._calls.items()
        )

    @property
    def idle(self) -> bool:
        """Whether the configuration leaves nothing out: functions are called as if there were no agent."""
        return self._bypassed

    @property
    def bytes_held(self) -> int:
        """Bytes of the tensors that are kept at this moment."""
        return sum(
            tensor.numel() * tensor.element_size()
            for branch in self._branches.values()
            for tensor in branch.kept.tensors()
        )

    def bytes_for(
        self, hidden_shape: Sequence[int], dtype: torch.dtype, encoder_shape: Sequence[int] | None = None
    ) -> int:
        """Return the most bytes that will be held in a generation of `steps_count` steps, all branches together.

        Args:
            hidden_shape: for "dit_block_cache" the shape of `hidden_states`, for "attention_cache" that of one output.
            dtype: its dtype.
            encoder_shape: of `encoder_hidden_states`, where the blocks of "dit_block_cache" are given any.
        """
        if self._bypassed or not any(map(self._usual.keeps, range(self._usual.steps))):
            return 0
        elements = math.prod(hidden_shape)
        if self._config.method == BLOCKS:
            elements += 0 if encoder_shape is None else math.prod(encoder_shape)
        else:
            elements *= self._config.blocks_count
        return elements * dtype.itemsize * len(self._names)


def _names(branches: int | Sequence[str]) -> tuple[str, ...]:
    if branches == 1:
        return ("",)
    names = tuple(map(str, range(branches))) if isinstance(branches, int) else tuple(branches)
    distinct = not isinstance(branches, str) and len(set(names)) == len(names) > 0
    if not distinct or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"branches={branches!r}: legal are a number > 0 and different names, ('cond', 'uncond').")
    return names
