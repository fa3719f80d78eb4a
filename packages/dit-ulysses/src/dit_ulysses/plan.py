"""How the ranks are shared out, and which way is the cheapest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from dit_ulysses.costs import CONSTANTS, Costs
from dit_ulysses.errors import PlanError
from dit_ulysses.estimate import Estimate, Workload, check_whole, estimate, refusal, sent_by_rank

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_AXES = ("cfg", "ring", "ulysses", "tensor")  # of a mesh; the last are neighbours


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How many ranks share each kind of work; their product is the number of ranks.

    Attributes:
        cfg: 2 where one half of the ranks computes the guided pass and the other the unguided one.
        ulysses: ranks that exchange heads for tokens.
        ring: ranks among which keys and values go round.
        tensor: ranks that share the weights. This package counts them and does not run them: your model has to.

    Raises:
        PlanError: a number is no whole number from 1 on, or cfg is neither 1 nor 2.
    """

    cfg: int = 1
    ulysses: int = 1
    ring: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_whole(name, value)
        if self.cfg > 2:
            raise PlanError(f"cfg is {self.cfg}; there are two passes to share out, so 1 or 2 is expected")

    @property
    def world(self) -> int:
        """Number of ranks."""
        return prod(asdict(self).values())

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        """In words: "cfg 2 × ulysses 4"."""
        said = [f"{name} {degree}" for name, degree in asdict(self).items() if degree > 1]
        return " × ".join(said) or "one rank"

    def as_dict(self) -> dict[str, int]:
        """Return the degrees."""
        return asdict(self)

    def check(self, world: int) -> None:
        """Raise PlanError, with the plans that fit, unless this plan is one for so many ranks."""
        check_whole("world", world)
        if self.world != world:
            fitting = ", ".join(str(plan) for plan in plans(world, tensor=self.tensor > 1))
            degrees = " × ".join(map(str, asdict(self).values()))
            raise PlanError(
                f"{self} takes {self.world} ranks (cfg × ulysses × ring × tensor = {degrees}), and there "
                f"{'is' if world == 1 else 'are'} {world}; what fits {world}: {fitting}"
            )

    def bytes_per_step(self, work: Workload) -> dict[str, int]:
        """Return what the rank that sends most sends in a step, by the names under which a `WireMeter` counts it.

        For ``ulysses_attention`` and ``usp_attention``, the predictions that ``gather_sequence`` and ``cfg_parallel``
        exchange in fp32, and, of tensor parallelism, ring all-reduces.

        Raises:
            PlanError: the plan cannot do this work.
        """
        return max(sent_by_rank(self, work), key=lambda sent: sum(sent.values()))

    def estimate(self, work: Workload, costs: Costs | None = None) -> Estimate:
        """Return what this plan costs in a step; `Costs()` when None.

        Raises:
            PlanError: the plan cannot do this work.
        """
        return estimate(self, work, costs or Costs())

    @classmethod
    def auto(
        cls,
        world: int,
        *,
        heads: int,
        tokens: int,
        kv_heads: int | None = None,
        head_dim: int = 128,
        layers: int = 1,
        batch: int = 1,
        guided: bool = False,
        bytes_per_element: int = 2,
        text_tokens: int = 0,
        ffn_dim: int | None = None,
        prediction_channels: int = 64,
        tensor: bool = False,
        memory: int | None = None,
        costs: Costs | None = None,
    ) -> ParallelPlan:
        """Return the plan that the cost model finds the cheapest; `explain` says why.

        Args:
            world: number of ranks.
            heads, tokens, kv_heads, head_dim, layers, batch, guided, bytes_per_element, text_tokens, ffn_dim,
                prediction_channels: see `Workload`.
            tensor: plans with tensor parallelism are looked at as well.
            memory: bytes that weights and activations of a rank may take.
            costs: of the machine; the guesses of `Costs` when None.

        Raises:
            PlanError: a number is none, or no plan can do this.
        """
        work = Workload(
            heads=heads,
            tokens=tokens,
            kv_heads=kv_heads,
            head_dim=head_dim,
            layers=layers,
            batch=batch,
            guided=guided,
            bytes_per_element=bytes_per_element,
            text_tokens=text_tokens,
            ffn_dim=ffn_dim,
            prediction_channels=prediction_channels,
        )
        return cls.explain(world, work, tensor=tensor, memory=memory, costs=costs).best.plan

    @classmethod
    def explain(
        cls,
        world: int,
        work: Workload,
        *,
        tensor: bool = False,
        memory: int | None = None,
        costs: Costs | None = None,
    ) -> Comparison:
        """Return all plans for so many ranks, and what each costs; print it.

        Args:
            world, tensor, memory, costs: as those of `auto`.
            work: a denoising step.

        Raises:
            PlanError: a number is none, or no plan can do this.
        """
        check_whole("world", world)
        costs, found, refused = costs or Costs(), [], {}
        for plan in plans(world, tensor=tensor):
            if reason := refusal(plan, work):
                refused[plan] = reason
                continue
            one = estimate(plan, work, costs)
            if memory is not None and one.memory > memory:
                refused[plan] = f"a rank takes about {one.memory / 1e9:.1f} GB, {memory / 1e9:.1f} GB are allowed"
            else:
                found.append(one)
        if not found:
            reasons = "; ".join(f"{plan}: {reason}" for plan, reason in refused.items())
            more = "" if tensor else "; tensor parallelism, where your model has it, shares the weights"
            raise PlanError(f"no plan of {world} ranks can do {work}: {reasons}{more if memory else ''}")
        return Comparison(work=work, costs=costs, estimates=tuple(sorted(found, key=_order)), refused=refused)

    def mesh(self, device_type: str) -> DeviceMesh:
        """Return the ranks of the job as a mesh ("cfg", "ring", "ulysses"), with "tensor" as the last where it is used.

        Neighbours are in the last dimension: those that exchange most share a node. Every rank has to call this.

        Args:
            device_type: such as "npu", "cuda" or "cpu".

        Raises:
            PlanError: the job has another number of ranks.
            GroupError: there is no process group yet.
        """
        from torch.distributed.device_mesh import init_device_mesh

        from dit_ulysses.peers import Peers

        self.check(Peers.of(None).size)
        names = _AXES if self.tensor > 1 else _AXES[:-1]
        return init_device_mesh(device_type, tuple(getattr(self, name) for name in names), mesh_dim_names=names)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All plans for some ranks, and what each costs.

    Attributes:
        work: a denoising step.
        costs: of the machine.
        estimates: the cheapest first, the simpler before the other where they cost the same.
        refused: why others cannot do it.
    """

    work: Workload
    costs: Costs
    estimates: tuple[Estimate, ...]
    refused: dict[ParallelPlan, str]

    @property
    def best(self) -> Estimate:
        """The cheapest."""
        return self.estimates[0]

    @property
    def why(self) -> str:
        """Why the best is that."""
        best = self.best
        if len(self.estimates) == 1:
            return f"{best.plan}: the only plan that can do it"
        second = self.estimates[1]
        apart = {
            f"attention (busiest rank: {second.heads} of {self.work.heads} heads, here {best.heads})": "attention",
            "matrix products": "matmul",
            "sending": "wire",
        }
        differences = {words: getattr(second, name) - getattr(best, name) for words, name in apart.items()}
        said = [
            f"{abs(seconds):.3g} s {'more' if seconds > 0 else 'less'} {words}"
            for words, seconds in sorted(differences.items(), key=lambda item: -item[1])
            if abs(seconds) > 1e-6 * best.seconds
        ]
        reason = ", ".join(said) or "as much time, and more parts"
        return f"{best.plan}: {best.seconds:.3g} s a step; the next, {second.plan}, has {reason}"

    def __str__(self) -> str:
        """A table, and the reason."""
        head = ("plan", "bytes per rank", "attention s", "matmul s", "wire s", "total s", "sent for")
        rows = [head, *map(_row, self.estimates)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(_cells(row, widths)).rstrip() for row in rows]
        lines += [f"{plan}: not possible: {reason}" for plan, reason in self.refused.items()]
        guessed = ", ".join(name for name in CONSTANTS if name not in self.costs.measured)
        return "\n".join(
            [f"A step of {self.work}:", "", *lines, "", self.why, f"Costs that are guesses: {guessed or 'none'}."]
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what can be written as JSON."""
        return {
            "plan": self.best.plan.as_dict(),
            "why": self.why,
            "work": asdict(self.work),
            "estimates": [one.as_dict() for one in self.estimates],
            "refused": [{"plan": plan.as_dict(), "reason": reason} for plan, reason in self.refused.items()],
            "costs": self.costs.as_dict(),
        }


def plans(world: int, *, tensor: bool = False) -> Iterator[ParallelPlan]:
    """Yield every plan for so many ranks."""
    for cfg in (1, 2):
        for degree in _divisors(world // cfg) if world % cfg == 0 else ():
            for ring in _divisors(world // cfg // degree):
                rest = world // cfg // degree // ring
                if rest == 1 or tensor:
                    yield ParallelPlan(cfg=cfg, ulysses=degree, ring=ring, tensor=rest)


def _divisors(number: int) -> list[int]:
    return [each for each in range(number, 0, -1) if number % each == 0]


def _order(one: Estimate) -> tuple[float, int, int, int, int]:
    """The cheapest first; at nine digits, as sums of the same seconds may differ in the last ones."""
    plan = one.plan
    parts = sum(degree > 1 for degree in plan.as_dict().values())
    return float(f"{one.seconds:.9g}"), parts, plan.tensor, plan.ring, plan.cfg


def _row(one: Estimate) -> tuple[str, ...]:
    seconds = [f"{value:.4g}" for value in (one.attention, one.matmul, one.wire, one.seconds)]
    kinds = ", ".join(f"{name} {count:,}" for name, count in one.sent.items())
    return (str(one.plan), f"{one.bytes:,}", *seconds, kinds or "nothing")


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    last = len(row) - 1
    return [
        cell.ljust(width) if at in (0, last) else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
