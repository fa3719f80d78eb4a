"""What a plan costs: the bytes that a rank sends, exactly, and the seconds that this takes, roughly.

Per rank, layer and pass, with S tokens, C channels, P ranks and b bytes per element (arXiv 2309.14509, 2310.01889,
2104.04473): Ulysses sends ``4·(S·C/P)·(P−1)/P·b``, a ring ``2·(S/P)·C·(P−1)·b``, tensor parallelism
``2·(P−1)/P·S·C·b`` for each of its all-reduces. Those hold for even shares; what is computed here holds for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_ulysses.costs import Costs
from dit_ulysses.errors import PlanError
from dit_ulysses.shares import HeadShare, head_shares, shares

if TYPE_CHECKING:
    from dit_ulysses.plan import ParallelPlan

_PREDICTION_BYTES = 4  # predictions are combined in fp32


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A denoising step of a diffusion transformer.

    A layer is one of Wan: self-attention, cross-attention to a text that every rank holds, feed-forward. Where
    `text_tokens` are joint, there is no cross-attention.

    Attributes:
        heads: query heads; they and `head_dim` make the width of the model.
        tokens: of one sequence.
        kv_heads: key and value heads; `heads` when None.
        head_dim: channels of a head.
        layers: number of layers.
        batch: sequences.
        guided: classifier-free guidance, so that the model runs twice.
        bytes_per_element: of activations and weights.
        text_tokens: joint tokens: every rank holds them, and they take part in self-attention.
        ffn_dim: width of the feed-forward; 4 times that of the model when None.
        prediction_channels: what the model predicts for a token; Wan: 16 channels of a patch of 1×2×2.

    Raises:
        PlanError: a number is none, or the key heads do not divide the query heads.
    """

    heads: int
    tokens: int
    kv_heads: int | None = None
    head_dim: int = 128
    layers: int = 1
    batch: int = 1
    guided: bool = False
    bytes_per_element: int = 2
    text_tokens: int = 0
    ffn_dim: int | None = None
    prediction_channels: int = 64

    def __post_init__(self) -> None:
        for name in ("kv_heads", "ffn_dim"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.heads if name == "kv_heads" else 4 * self.width)
        for name, value in vars(self).items():
            if name != "guided":
                check_whole(name, value, 0 if name == "text_tokens" else 1)
        if self.heads % self.key_heads:
            raise PlanError(f"kv_heads is {self.kv_heads}, heads is {self.heads}; the former have to divide the latter")

    @property
    def width(self) -> int:
        """Channels of the model."""
        return self.heads * self.head_dim

    @property
    def key_heads(self) -> int:
        """Key and value heads."""
        assert self.kv_heads is not None, "it was filled in"
        return self.kv_heads

    @property
    def attentions(self) -> int:
        """Attentions of a layer."""
        return 1 if self.text_tokens else 2

    @property
    def layer_weights(self) -> int:
        """Elements of the weights of a layer."""
        assert self.ffn_dim is not None, "it was filled in"
        projections = 2 * self.width * (self.width + self.key_heads * self.head_dim)
        return self.attentions * projections + 2 * self.width * self.ffn_dim

    def __str__(self) -> str:
        """In words."""
        heads = f"{self.heads} heads" + (f" ({self.key_heads} of keys)" if self.kv_heads != self.heads else "")
        text = f", {self.text_tokens:,} joint" if self.text_tokens else ""
        guided = ", guided" if self.guided else ""
        sizes = f"{self.tokens:,} tokens{text}, {self.layers} layer{'s' * (self.layers > 1)}, batch {self.batch}"
        return f"{heads} of {self.head_dim}, {sizes}{guided}"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one plan costs in one denoising step.

    Attributes:
        plan: that plan.
        sent: bytes that the rank which sends most sends, by the names under which a `WireMeter` counts them.
        heads: that the busiest rank attends.
        attention, matmul: seconds of computing of the busiest rank.
        wire: seconds of sending that nothing hides.
        memory: bytes of weights and activations of a rank, roughly.
    """

    plan: ParallelPlan
    sent: dict[str, int]
    heads: int
    attention: float
    matmul: float
    wire: float
    memory: int

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return sum(self.sent.values())

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return self.attention + self.matmul + self.wire

    def as_dict(self) -> dict[str, Any]:
        """Return what can be written as JSON."""
        return {
            "plan": self.plan.as_dict(),
            "bytes": self.bytes,
            "sent": self.sent,
            "seconds": self.seconds,
            **{name: getattr(self, name) for name in ("attention", "matmul", "wire", "heads", "memory")},
        }


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise PlanError unless a value is a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{name} is {value!r}; a whole number from {least} on is expected")


def refusal(plan: ParallelPlan, work: Workload) -> str | None:
    """Say why a plan cannot do this work; None where it can."""
    if plan.cfg > 1 and not work.guided:
        return "cfg needs guidance: without it there is one pass, and nothing to share out"
    if work.heads % plan.tensor or work.key_heads % plan.tensor:
        return f"tensor {plan.tensor} does not divide {work.heads} heads and {work.key_heads} key heads"
    if plan.ring > 1 and work.text_tokens:
        return "a ring takes no joint tokens; Ulysses does"
    if plan.sequence > work.tokens:
        return f"{work.tokens} tokens are fewer than the {plan.sequence} ranks that share them"
    return None


def estimate(plan: ParallelPlan, work: Workload, costs: Costs) -> Estimate:
    """Return what a plan costs.

    Raises:
        PlanError: it cannot do this work.
    """
    return _Model(plan, work, costs).estimate()


def sent_by_rank(plan: ParallelPlan, work: Workload) -> list[dict[str, int]]:
    """Return the bytes that the ranks of one sequence send in a step, in the order of the mesh ("ring", "ulysses").

    Raises:
        PlanError: the plan cannot do this work.
    """
    return _Model(plan, work, Costs()).sent_by_rank()


class _Model:
    """One plan for one workload."""

    def __init__(self, plan: ParallelPlan, work: Workload, costs: Costs) -> None:
        if reason := refusal(plan, work):
            raise PlanError(f"{plan} does not fit {work}: {reason}")
        self.plan, self.work, self.costs = plan, work, costs
        self.lengths = shares(work.tokens, plan.sequence)
        self.rows = [sum(self.lengths[at : at + plan.ulysses]) for at in range(0, plan.sequence, plan.ulysses)]
        heads, kv_heads = work.heads // plan.tensor, work.key_heads // plan.tensor
        self.heads: list[HeadShare] = head_shares(heads, kv_heads, plan.ulysses)[0]
        self.packed = sum(share.heads + 2 * share.kv_heads for share in self.heads)
        # Passes of a layer in a step.
        self.calls = work.layers * (2 if work.guided and plan.cfg == 1 else 1)

    def estimate(self) -> Estimate:
        sent = max(self.sent_by_rank(), key=lambda of_rank: sum(of_rank.values()))
        attention = self._attention()
        return Estimate(
            plan=self.plan,
            sent=sent,
            heads=self.heads[0].heads,
            attention=attention,
            matmul=self._matmul(),
            wire=self._wire(sent, attention),
            memory=self._memory(),
        )

    def sent_by_rank(self) -> list[dict[str, int]]:
        rows, columns = range(self.plan.ring), range(self.plan.ulysses)
        return [self._sent(row, column) for row in rows for column in columns]

    def _sent(self, row: int, column: int) -> dict[str, int]:
        work, plan, share = self.work, self.plan, self.heads[column]
        here, of_row = self.lengths[row * plan.ulysses + column], self.rows[row]
        unit = work.batch * work.head_dim * work.bytes_per_element * self.calls  # of a token and a head
        others = self.packed - share.heads - 2 * share.kv_heads
        back = of_row - here + work.text_tokens * (plan.ulysses - 1)
        # A rank without heads takes no part; where heads share keys unevenly, each takes its own along.
        kv_heads = share.kv_heads if share.index is None else share.heads
        # A row passes on the keys of every row but the next, where their way ends.
        passed = work.tokens - self.rows[(row + 1) % plan.ring]
        prediction = work.prediction_channels * work.batch * _PREDICTION_BYTES
        reduced = (here + work.text_tokens) * work.width * work.batch * work.bytes_per_element
        sent = {
            "tokens to heads": here * others * unit,
            "attention to tokens": share.heads * back * unit,
            "ring": 2 * passed * kv_heads * unit,
            "tensor": self.calls * (work.attentions + 1) * 2 * reduced * (plan.tensor - 1) // plan.tensor,
            "gather": here * (plan.sequence - 1) * prediction * (self.calls // work.layers),
            "guidance": work.tokens * prediction * (plan.cfg - 1),
        }
        return {name: count for name, count in sent.items() if count}

    def _attention(self) -> float:
        work = self.work
        queries, keys = self.rows[0] + work.text_tokens, work.tokens + work.text_tokens
        flops = 4 * work.batch * work.head_dim * self.heads[0].heads * queries * keys * self.calls
        return flops / (self.costs.attention_flops * (self.costs.ring_pace if self.plan.ring > 1 else 1.0))

    def _matmul(self) -> float:
        tokens = self.work.batch * (self.lengths[0] + self.work.text_tokens) * self.calls
        return 2 * tokens * self.work.layer_weights / self.plan.tensor / self.costs.matmul_flops

    def _wire(self, sent: dict[str, int], attention: float) -> float:
        plan, passes = self.plan, self.calls // self.work.layers
        columns, rows = plan.ulysses * plan.tensor, plan.sequence * plan.tensor
        seconds = sum(
            self._exchanges(calls, sent.get(name, 0), ranks, apart)
            for name, calls, ranks, apart in (
                ("tokens to heads", self.calls, plan.ulysses, plan.tensor),
                ("attention to tokens", self.calls, plan.ulysses, plan.tensor),
                ("tensor", 2 * (self.work.attentions + 1) * self.calls, plan.tensor, 1),
                ("gather", passes, plan.sequence, plan.tensor),
                ("guidance", 1, plan.cfg, rows),
            )
        )
        if plan.ring > 1:
            # To a neighbour: where the ring leaves a node, all wait for the rank that sends across.
            turning = self._exchanges(self.calls * (plan.ring - 1), sent.get("ring", 0), plan.ring, columns, shift=True)
            hides = attention * (plan.ring - 1) / plan.ring
            seconds += turning - min(self.costs.ring_hidden * turning, hides)
        return seconds

    def _exchanges(self, calls: int, sent: int, ranks: int, apart: int, *, shift: bool = False) -> float:
        """Seconds of so many exchanges that together send so much, among ranks whose numbers are so far apart."""
        if ranks == 1:
            return 0.0
        costs, node, extent = self.costs, self.costs.ranks_per_node, ranks * apart
        if extent <= node and (node % extent == 0 or self.plan.world <= node):
            return calls * costs.latency_inside + sent / costs.bandwidth_inside
        beside = max(1, node // apart) if extent % node == 0 else 1  # ranks of the group on one node, at the least
        across = sent if shift else sent * (ranks - beside) / (ranks - 1)
        return calls * costs.latency_between + max(
            across / costs.bandwidth_between, (sent - across) / costs.bandwidth_inside
        )

    def _memory(self) -> int:
        work, plan = self.work, self.plan
        assert work.ffn_dim is not None, "it was filled in"
        # Eight tensors of the width of the model live at once (input, queries, keys, values, twice around an exchange).
        elements = work.batch * (self.lengths[0] + work.text_tokens) * (8 * work.width + work.ffn_dim // plan.tensor)
        return (work.layers * work.layer_weights // plan.tensor + elements) * work.bytes_per_element
