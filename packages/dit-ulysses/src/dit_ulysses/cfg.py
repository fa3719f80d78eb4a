"""Guidance in parallel: one rank computes the conditional prediction, another the unconditional one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ulysses.agreement import agree
from dit_ulysses.errors import GroupError, ShapeError, UlyssesError
from dit_ulysses.peers import Peers
from dit_ulysses.wire import all_to_all


def cfg_parallel(
    cond_fn: Callable[[], Tensor], uncond_fn: Callable[[], Tensor], *, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the conditional and the unconditional prediction, on both ranks the same to the bit.

    The first rank of the group calls `cond_fn` alone and the second one `uncond_fn` alone; a group of one calls both.
    The gradient is that of the sum of the losses of all ranks: where both compute the same loss, halve it.

    Args:
        cond_fn, uncond_fn: compute a prediction; both of one shape and dtype.
        group: of one or two ranks; the whole job when None.

    Raises:
        GroupError: there are more ranks, or the group cannot be used by this process or for these tensors.
        ShapeError: in a group of one, the predictions differ in shape or dtype.
        DisagreementError: in a group of two, they do, or the other rank's function raised; it says what.
        LostRankError: a rank was lost.
    """
    peers = Peers.of(group)
    if peers.size > 2:
        raise GroupError(f"the group has {peers.size} ranks; 1 or 2 are expected, one for each prediction")
    if peers.size == 1:
        both = cond_fn(), uncond_fn()
        _check_alike(*both)
        return both
    try:
        mine = (cond_fn, uncond_fn)[peers.rank]()
        peers = Peers.of(group, mine)
    except Exception as error:
        with suppress(UlyssesError):  # the other rank learns why nothing comes; this one shows the error itself
            agree(peers, {"function": "cfg_parallel", "raised": repr(error)}, remember=False)
        raise
    facts = {
        "function": "cfg_parallel",
        "shape": list(mine.shape),
        "dtype": mine.dtype,
        "gradient": torch.is_grad_enabled() and mine.requires_grad,
    }
    # Compared each time: a step takes much longer than this, and the other rank may have raised.
    agree(peers, facts, remember=False)
    counts = [mine.numel()] * 2
    cond, uncond = all_to_all(mine.reshape(-1).repeat(2), counts, counts, peers, "guidance").view(2, *mine.shape)
    return cond, uncond


def _check_alike(cond: Tensor, uncond: Tensor) -> None:
    if (cond.shape, cond.dtype) != (uncond.shape, uncond.dtype):
        raise ShapeError(
            f"cond_fn returned {cond.dtype} {list(cond.shape)} and uncond_fn {uncond.dtype} {list(uncond.shape)}; one "
            "shape and dtype are expected"
        )
