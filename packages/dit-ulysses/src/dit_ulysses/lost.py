"""Who is missing when an exchange fails.

A backend says that a connection broke, or that time is up, and not whose. So every rank that sees a failure reports to
the store of the job, and then looks whether those it waited for do as well: who stays silent is lost. Who was waited
for in vain because it waited itself has reported, in whatever group that was. The first answer is kept for all ranks,
because those who leave next break connections too. A job's store is with torchrun, so it outlives every rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from dit_ulysses.errors import LostRankError
from dit_ulysses.peers import Peers, named

_GRACE = 5.0  # seconds; a rank sees a broken connection at once, and a time limit as late as its neighbours
_PAUSE = 0.05


@contextmanager
def naming_the_lost(peers: Peers, waited_for: Iterable[int]) -> Iterator[None]:
    """Turn the failure of an exchange into a `LostRankError` that names the rank.

    Args:
        peers: the ranks of the exchange.
        waited_for: those that could have made it fail, in the numbers of the whole job.
    """
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        me = peers.names[peers.rank]
        ranks = _lost(me, [rank for rank in waited_for if rank != me])
        who = f"{named(ranks)} {'was' if len(ranks) == 1 else 'were'} lost" if ranks else "a rank was lost"
        reason = str(error).partition("\n")[0]
        raise LostRankError(
            f"{who} while rank {me} exchanged tensors with {named(peers.names)} ({reason}); look at what it wrote last",
            ranks,
        ) from error


def _lost(me: int, waited_for: list[int]) -> tuple[int, ...]:
    """The ranks that are missing; empty when the store does not say."""
    try:
        store = dist.PrefixStore("dit_ulysses/lost", _job_store())  # type: ignore[attr-defined]
        store.set(f"here/{me}", "1")
        start = time.monotonic()
        while not store.check(["lost"]):
            silent = [rank for rank in waited_for if not store.check([f"here/{rank}"])]
            waited = time.monotonic() - start
            if silent and waited > _GRACE:
                store.compare_set("lost", "", ",".join(map(str, silent)))
            elif waited > 2 * _GRACE:  # nor does anyone else know
                return ()
            time.sleep(_PAUSE)
        return tuple(int(rank) for rank in store.get("lost").decode().split(","))
    except RuntimeError:  # the store went with the rank that held it
        return ()


def _job_store() -> Any:
    # The one way to the store that all ranks share; torch has no public name for it.
    return dist.distributed_c10d._get_default_store()
