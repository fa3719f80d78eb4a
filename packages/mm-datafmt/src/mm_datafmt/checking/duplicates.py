"""Records that say the same, found in memory that a data set of millions can afford."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from ..sample import Sample

_FIRST_SLOTS = 1 << 12


def digest_of(sample: Sample) -> int:
    """Return 64 bits (BLAKE2b, never 0) of what is trained on: turns, media and tools, not an ``id``."""
    # A NUL within a text is a fault by itself, so it may separate them.
    parts = [f"{len(sample.messages)} {len(sample.images)} {len(sample.videos)}", sample.tools or ""]
    for role, content, loss, _ in sample.messages:
        parts += (role, content) if loss is None else (role, content, f"loss {loss}")
    parts += (*sample.images, *sample.videos, *sample.audios)
    text = "\0".join(parts)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") or 1


class Duplicates:
    """A hash table of 12 bytes a slot (digest, record) that is at most two thirds full: 18 to 36 bytes a record.

    Different records with the same digest would be taken for duplicates: with n records the probability of a single
    such case is about n² / 2⁶⁵, 6e-8 for 1.5 million.
    """

    def __init__(self) -> None:
        self._count = 0
        self._allot(_FIRST_SLOTS)

    def _allot(self, slots: int) -> None:
        self._digests = array("Q", bytes(8 * slots))
        self._records = array("I", bytes(4 * slots))
        self._mask = slots - 1
        self._most = slots * 2 // 3

    def first(self, digest: int, record: int) -> int | None:
        """Return the number of the record that came with ``digest`` before, or None and remember ``record``."""
        digests, mask = self._digests, self._mask
        slot = digest & mask
        while held := digests[slot]:
            if held == digest:
                return self._records[slot]
            slot = (slot + 1) & mask
        digests[slot], self._records[slot] = digest, record
        self._count += 1
        if self._count > self._most:
            self._grow()
        return None

    def _grow(self) -> None:
        digests, records = self._digests, self._records
        self._allot(2 * len(digests))
        self._count = 0
        for digest, record in zip(digests, records, strict=True):
            if digest:
                self.first(digest, record)
