"""What goes through the model: the sizes that activations depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Load:
    """The largest micro-batch of a run, and a step of a rank.

    Attributes:
        rows: samples that are padded to one length; 1 where they are packed.
        length: tokens of a row.
        loss_tokens: tokens that carry loss.
        patches: patches of the pictures and videos.
        micro_batches: of a step on a rank.
        step_tokens: tokens of all of them, padding included; 0: each is as large as the largest.
        step_patches: patches of all of them; None: each has as many as the largest.
        pieces: rows, or pictures, are of different lengths, so that an attention kernel for equal ones runs in pieces.
    """

    rows: int
    length: int
    loss_tokens: int
    patches: int
    micro_batches: int
    step_tokens: int = 0
    step_patches: int | None = None
    pieces: bool = True

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch."""
        return self.rows * self.length

    def padded(self, multiple: int) -> Load:
        """With a number of tokens that sequence parallelism can cut."""
        return replace(self, length=-(-self.length // multiple) * multiple)

    @property
    def data_bytes(self) -> tuple[int, int]:
        """Bytes of a step's micro-batches on the device: without pixels, and of the pixels' patches (times width)."""
        tokens = self.step_tokens or self.tokens * self.micro_batches
        patches = self.patches * self.micro_batches if self.step_patches is None else self.step_patches
        return tokens * TOKEN, patches * PIXEL


# Ids, labels and three positions in int64; the loss mask as it came and as it is weighed, float32.
TOKEN = 8 * 5 + 4 * 2
PIXEL = 4
