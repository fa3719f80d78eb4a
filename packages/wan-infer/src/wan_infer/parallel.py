"""One video on several processes, by dit-ulysses. Nobody else here knows it.

The tokens of a video are shared out after they are embedded, and put together before they become latents again. In
between only self-attention looks at those of others: by Ulysses, by a ring, or by both. With ``cfg=2``, half of the
processes compute the conditional side of the guidance, and half the other. What comes out is the same in every process.

Shape suffixes: B batch, S all tokens, N heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ulysses import (
    DisagreementError,
    LostRankError,
    ParallelPlan,
    UlyssesError,
    Workload,
    cfg_parallel,
    gather_sequence,
    sequence_lengths,
    split_sequence,
    ulysses_attention,
    usp_attention,
)
from wan_infer.config import TransformerConfig
from wan_infer.errors import ProcessError, RequestError
from wan_infer.ops import attention
from wan_infer.processes import OneProcess, Processes


class Whole:
    """All tokens of a call of the transformer, where this process has them all."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Return this process's part of a tensor that all have."""
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return what `split` was given."""
        return x

    def attend(self, q_BSND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
        """Return the attention of this process's tokens to all, as `wan_infer.ops.attention`."""
        return attention(q_BSND, k_BSND, v_BSND)


class Alone:
    """A video in one process.

    Attributes:
        layout: processes for the sides of the guidance, and for the tokens of each: by Ulysses times in a ring.
        processes: who reads and writes.
    """

    def __init__(self) -> None:
        self.layout = {"cfg": 1, "ulysses": 1, "ring": 1}
        self.processes = OneProcess(torch.device("cpu"))

    def shards(self, tokens: int) -> Whole:
        """Return how so many tokens are shared out."""
        return Whole()

    def sides(self, functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Return what the functions return, in their order; they are called here or elsewhere."""
        return [function() for function in functions]

    def check_guidance(self, guidance: float) -> None:
        """Refuse to share out sides that there are not.

        Raises:
            RequestError: there is one side, for two groups of processes.
        """


class Parallel(Alone):
    """A video in all processes of a job.

    ::

        torch.distributed.init_process_group()          # under torchrun
        parallel = Parallel(ParallelPlan(cfg=2, ulysses=4))
        pipe = WanPipeline.from_pretrained(folder, parallel=parallel)
        made = pipe("the digit 3 moves left", seed=1)   # every process gets the whole

    Args:
        plan: how many do what; `dit_ulysses.ParallelPlan`.
        device: of this process; the CPU when None.

    Raises:
        RequestError: the plan is not for so many processes.
        ProcessError: another process was lost, or was asked for something else; so do all methods.
    """

    def __init__(self, plan: ParallelPlan, device: torch.device | None = None) -> None:
        device = device or torch.device("cpu")
        if plan.tensor > 1:
            raise RequestError(f"the plan is {plan}; this transformer shares no weights, so tensor is 1")
        with _explained():
            plan.check(dist.get_world_size())
            self._mesh = plan.mesh(device.type)
        self.layout = {"cfg": plan.cfg, "ulysses": plan.ulysses, "ring": plan.ring}
        self.processes = Processes(device)
        self._size = plan.ulysses * plan.ring
        self._ring = plan.ring > 1
        # In the order of the mesh, which is that of the shards.
        groups = [(side, dist.new_group(side)) for side in self._mesh.mesh.flatten(1).tolist()]
        self._group = next(group for side, group in groups if dist.get_rank() in side)

    def shards(self, tokens: int) -> Whole:
        """Return how so many tokens are shared out."""
        if self._size == 1:
            return Whole()
        lengths = sequence_lengths(tokens, self._size)
        if self._ring:
            attend = partial(usp_attention, mesh=self._mesh["ring", "ulysses"], lengths=lengths)
        else:
            attend = partial(ulysses_attention, group=self._group, attention=attention, lengths=lengths)
        return _Shards(self._group, lengths, attend)

    def sides(self, functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Return what the functions return, in their order; they are called here or elsewhere."""
        if self.layout["cfg"] == 1:
            return super().sides(functions)
        conditional, unconditional = functions
        with _explained():
            return list(cfg_parallel(conditional, unconditional, group=self._mesh.get_group("cfg")))

    def check_guidance(self, guidance: float) -> None:
        """Refuse to share out sides that there are not.

        Raises:
            RequestError: there is one side, for two groups of processes.
        """
        if guidance == 1 and self.layout["cfg"] != 1:
            raise RequestError(
                "guidance is 1, which has no unconditional side, and half of the processes are there for that; share "
                "out the tokens alone: cfg=1 (--cfg_size 1)"
            )


class _Shards(Whole):
    """Tokens that are spread over processes."""

    def __init__(self, group: dist.ProcessGroup, lengths: Sequence[int], attend: Callable[..., Tensor]) -> None:
        self._group, self._lengths, self._attend = group, lengths, attend

    def split(self, x: Tensor, dim: int) -> Tensor:
        with _explained():
            return split_sequence(x, dim, group=self._group, lengths=self._lengths)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        with _explained():
            return gather_sequence(x, dim, group=self._group, lengths=self._lengths)

    def attend(self, q_BSND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
        with _explained():
            return self._attend(q_BSND, k_BSND, v_BSND)


def checked_plan(world: int, *, cfg: int, ulysses: int, ring: int) -> ParallelPlan:
    """Return a plan for so many processes.

    Raises:
        RequestError: it is for another number of them; says which plans fit.
    """
    with _explained():
        plan = ParallelPlan(cfg=cfg, ulysses=ulysses, ring=ring)
        plan.check(world)
    return plan


def chosen_plan(
    world: int, config: TransformerConfig, tokens: int, *, guided: bool, bytes_per_element: int
) -> tuple[ParallelPlan, str]:
    """Return the plan that dit-ulysses expects to be the fastest, and why it is that.

    Args:
        world: number of processes.
        config: of the transformer.
        tokens: of one video.
        guided: whether there are two sides to compute.
        bytes_per_element: of what is sent.
    """
    work = Workload(
        heads=config.num_heads,
        tokens=tokens,
        head_dim=config.head_dim,
        layers=config.num_layers,
        guided=guided,
        bytes_per_element=bytes_per_element,
        ffn_dim=config.ffn_dim,
        prediction_channels=config.out_dim * math.prod(config.patch_size),
    )
    with _explained():
        found = ParallelPlan.explain(world, work)
    return found.best.plan, found.why


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (LostRankError, DisagreementError) as error:
        raise ProcessError(str(error)) from error
    except UlyssesError as error:
        raise RequestError(str(error)) from error
