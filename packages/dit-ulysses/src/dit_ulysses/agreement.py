"""Ranks that disagree find out before they exchange tensors, and all of them."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from dit_ulysses.errors import DisagreementError, ShapeError, UlyssesError
from dit_ulysses.peers import Peers, named
from dit_ulysses.wire import Arriving, exchange

Facts = Mapping[str, object]

# What was agreed on, by group: that is not asked again. A group that is gone takes its entry along.
_AGREED: weakref.WeakKeyDictionary[dist.ProcessGroup, set[str]] = weakref.WeakKeyDictionary()


def agree(peers: Peers, facts: Facts, *, remember: bool = True) -> None:
    """Return when every rank has called this with the same facts.

    Args:
        peers: the ranks.
        facts: what has to be the same, by name.
        remember: compare them only once, at set-up. Ranks that part afterwards are not found out here: a rank no longer
            looks at others while it is called with what was agreed on before.

    Raises:
        DisagreementError: on every rank, with what differs and between whom.
        LostRankError: a rank was lost.
    """
    if peers.size == 1:
        return
    agreed = _AGREED.setdefault(peers.group, set())
    mine = json.dumps({name: str(value) for name, value in facts.items()})
    if remember and mine in agreed:
        return
    digest = hashlib.sha256(mine.encode()).digest()
    if len(set(_everyone(digest, [len(digest)] * peers.size, peers))) > 1:
        raise DisagreementError(f"the ranks of the group do not agree; {'; '.join(_differences(mine, peers))}")
    if remember:
        agreed.add(mine)


@contextmanager
def telling(peers: Peers, function: str) -> Iterator[None]:
    """Let the other ranks know of bad input that one of them has found, as they would wait for it in vain.

    Where they have agreed before, they no longer listen; then they see it as a rank that was lost.
    """
    try:
        yield
    except ShapeError as error:
        if not _AGREED.get(peers.group):
            with suppress(UlyssesError):  # its own error is the one to show
                agree(peers, {"function": function, "bad input": error}, remember=False)
        raise


def _everyone(mine: bytes, lengths: Sequence[int], peers: Peers) -> list[bytes]:
    """Send some bytes to every rank and return what each has sent. It is no traffic of tensors, so no meter sees it."""
    arriving = Arriving(peers)
    sent = torch.tensor(list(mine) * peers.size, dtype=torch.uint8, device=peers.device)
    received = exchange(sent, [len(mine)] * peers.size, lengths, peers, "agreement", arriving, ())
    arriving.wait()
    return [bytes(part.tolist()) for part in received.split(list(lengths))]


def _differences(mine: str, peers: Peers) -> list[str]:
    """What is said about each fact that differs: "heads: 12 on ranks 0 and 1, 10 on rank 2"."""
    lengths = [int.from_bytes(size, "big") for size in _everyone(len(mine).to_bytes(4, "big"), [4] * peers.size, peers)]
    gathered: list[dict[str, str]] = [json.loads(facts) for facts in _everyone(mine.encode(), lengths, peers)]
    said = []
    for name in dict.fromkeys(name for facts in gathered for name in facts):
        by_value: dict[str, list[int]] = {}
        for rank, facts in zip(peers.names, gathered, strict=True):
            by_value.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(by_value) > 1:
            said.append(f"{name}: {', '.join(f'{value} on {named(ranks)}' for value, ranks in by_value.items())}")
    return said
