"""What all caches share: generations, branches, decisions, the ledger. It never touches what is cached."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from dit_cache.engine.moment import Decision, Evidence, Moment, Streams
from dit_cache.engine.predictors import Reuse, Secant
from dit_cache.engine.protocols import Guard, Policy, Predictor, Store
from dit_cache.engine.store import Keep, Memory
from dit_cache.errors import ConfigError, GenerationError
from dit_cache.meter.ledger import Entry, Ledger

Self = TypeVar("Self", bound="Cache")


@dataclass(kw_only=True)
class _Branch:
    """One side of the guidance in one generation."""

    policy: Policy
    guards: tuple[Guard, ...]
    memories: dict[str, Memory] = field(default_factory=dict)  # by the place where the value belongs
    shape: torch.Size | None = None  # of the latents
    steps_done: int = 0
    skipped: int = 0  # holes in a row

    @property
    def parts(self) -> tuple[Policy | Guard, ...]:
        return (self.policy, *self.guards)


class Cache:
    """The base of the caches: decides, agrees, remembers.

    Args:
        policy: when to compute.
        predictor: what to put in the holes.
        store: where computed values are kept.
        guards: when to compute after all; the first that has a reason decides.
        group: ranks that compute one generation together; dynamic decisions are those of its first rank.
        measure: also say, at every computed step, how wrong a prediction would have been there; costs a prediction,
            and waits for the device.
    """

    offers: frozenset[str] = frozenset()  # the evidence that a subclass has

    def __init__(
        self,
        policy: Policy,
        *,
        predictor: Predictor | None = None,
        store: Store | None = None,
        guards: Sequence[Guard] = (),
        group: ProcessGroup | None = None,
        measure: bool = False,
    ) -> None:
        self.policy = policy
        self.predictor: Predictor = predictor or Reuse()
        self.store: Store = store or Keep()
        self.guards = tuple(guards)
        self.group = group
        self.measure = measure
        self.ledger = Ledger()
        self._times: tuple[float, ...] | None = None
        self._branches: dict[str, _Branch] = {}
        self._decided: dict[int, Decision] = {}  # by step, for policies that decide once for all branches
        self._thread = 0
        parts: tuple[Policy | Guard, ...] = (policy, *self.guards)
        for part in parts:
            if missing := part.needs - self.offers:
                raise ConfigError(
                    f"{type(part).__name__} looks at the {', '.join(sorted(missing))}, which a {type(self).__name__} "
                    f"does not see; it sees: {', '.join(sorted(self.offers)) or 'nothing'}"
                )

    @contextmanager
    def generation(self: Self, sigmas: Sequence[float] | int) -> Iterator[Self]:
        """One generation: nothing is carried into it, and nothing is kept after it but the ledger.

        Args:
            sigmas: noise levels of the steps, with or without a final 0; or the number of steps.

        Raises:
            GenerationError: the last one has not ended: caches are not shared by generations at the same time.
        """
        self._open(sigmas)
        try:
            yield self
        finally:
            self._close()

    @property
    def bytes_held(self) -> int:
        """Bytes of what is kept now."""
        return sum(memory.nbytes for branch in self._branches.values() for memory in branch.memories.values())

    # ---- for the subclasses ----------------------------------------------------------------------------------------

    def _open(self, sigmas: Sequence[float] | int) -> None:
        if self._times is not None:
            raise GenerationError("a generation is going on in this cache; end it first, or make a cache for each")
        if isinstance(sigmas, int) and isinstance(self.predictor, Secant):
            raise ConfigError(f"sigmas are {sigmas}; Secant needs the noise levels themselves, not their number")
        times = tuple(map(float, range(sigmas) if isinstance(sigmas, int) else sigmas))
        times = times[:-1] if len(times) > 1 and not isinstance(sigmas, int) and times[-1] == 0 else times
        if not times or len(set(times)) < len(times) or not all(map(math.isfinite, times)):
            raise ConfigError(f"sigmas are {list(times)}; at least one is needed, all finite and different")
        self._times, self._thread, self.ledger = times, threading.get_ident(), Ledger()

    def _close(self) -> None:
        self._times = None
        self._branches.clear()
        self._decided.clear()

    def _moment(self, step: int | None, name: str) -> tuple[Moment, _Branch]:
        """The moment of the next evaluation of a branch."""
        if self._times is None:
            raise GenerationError("no generation is going on; write `with cache.generation(sigmas):` around the steps")
        if threading.get_ident() != self._thread:
            raise GenerationError("a generation is used by the thread that began it; make a cache for each thread")
        branch = self._branches.get(name)
        if branch is None:
            branch = self._branches[name] = _Branch(
                policy=copy.deepcopy(self.policy), guards=copy.deepcopy(self.guards)
            )
        step = branch.steps_done if step is None else step
        if not branch.steps_done <= step < len(self._times):
            raise GenerationError(
                f"step {step} of branch {name!r} was asked for; {branch.steps_done} are done of {len(self._times)}, "
                "counted from 0: a call of the other side of the guidance needs a branch of its own"
            )
        return Moment(step=step, steps=len(self._times), time=self._times[step], branch=name), branch

    def _memory(self, branch: _Branch, place: str = "") -> Memory:
        if place not in branch.memories:
            branch.memories[place] = Memory(self.predictor, self.store)
        return branch.memories[place]

    def _decide(self, at: Moment, branch: _Branch, seen: Evidence, *, ready: bool, device: torch.device) -> Decision:
        """Decide; `ready` is whether there is something to predict from."""
        decision = self._decided.get(at.step)
        if decision is None or not branch.policy.once:
            decision = branch.policy.decide(at, seen)
            reasons = (guard.overrule(at, seen, skipped=branch.skipped) for guard in branch.guards)
            if not decision.compute and (reason := next(filter(None, reasons), None)):
                decision = Decision(True, reason, decision.indicator)
            decision = self._agreed(decision, branch, device)
            self._decided[at.step] = decision
        if not decision.compute and not ready:
            decision = Decision(True, "nothing kept", decision.indicator)
        return decision

    def _agreed(self, decision: Decision, branch: _Branch, device: torch.device) -> Decision:
        if self.group is None or not any(part.dynamic for part in branch.parts):
            return decision
        flag = torch.tensor([decision.compute], dtype=torch.uint8, device=device)
        dist.broadcast(flag, group=self.group, group_src=0)
        compute = bool(flag.item())
        return decision if compute == decision.compute else Decision(compute, "agreed", decision.indicator)

    def _note(
        self,
        at: Moment,
        branch: _Branch,
        decision: Decision,
        *,
        predicted: float | None = None,
        realised: float | None = None,
    ) -> None:
        """Write down what was done, once the value is there: an evaluation that failed was never done."""
        branch.steps_done = at.step + 1
        branch.skipped = 0 if decision.compute else branch.skipped + 1
        self.ledger.record(
            Entry(
                step=at.step,
                branch=at.branch,
                computed=decision.compute,
                reason=decision.reason,
                indicator=decision.indicator,
                predicted_error=predicted,
                realised_error=realised,
            )
        )
        self.ledger.hold(self.bytes_held)

    def _tell(self, at: Moment, branch: _Branch, seen: Evidence, value: Streams) -> None:
        for part in branch.parts:
            part.computed(at, seen, value)
