"""What happened in a generation: which steps were computed, why, and at what error."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Literal

from dit_cache.meter.jsonable import jsonable
from dit_cache.meter.plots import plot_decisions

REPORT_VERSION = 1
COMPUTED, SKIPPED, BOTH, NEITHER = "C·± "


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One decision.

    Attributes:
        step: number of the denoising step, from 0.
        branch: which of the passes of classifier-free guidance, such as "cond" and "uncond".
        computed: whether the model ran; else something cached stood in.
        reason: why, in a word or two; entries are counted by it.
        indicator: what a policy looked at, in its own unit.
        predicted_error: relative L2 that was expected of skipping.
        realised_error: relative L2 that skipping had, or would have had, where it is known.
    """

    step: int
    branch: str
    computed: bool
    reason: str
    indicator: float | None = None
    predicted_error: float | None = None
    realised_error: float | None = None


class Ledger:
    """Collects the decisions of one generation. Recording costs an append: numbers are looked at only in a report.

    Attributes:
        entries: in the order of recording.
        flops_share: executed operations relative to a run without cache, set by whoever measured it; see `flops_share`.
        bytes_now: held by the cache at present.
        bytes_held: most that were held at once.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.flops_share: float | None = None
        self.bytes_now = 0
        self.bytes_held = 0

    def record(self, entry: Entry) -> None:
        """Append a decision."""
        self.entries.append(entry)

    def hold(self, nbytes: int) -> None:
        """Say how many bytes the cache holds now."""
        self.bytes_now = nbytes
        self.bytes_held = max(self.bytes_held, nbytes)

    @property
    def computed(self) -> int:
        """Number of decisions to compute."""
        return sum(entry.computed for entry in self.entries)

    @property
    def skipped(self) -> int:
        """Number of decisions to skip."""
        return len(self.entries) - self.computed

    @property
    def share(self) -> float:
        """Computed over all decisions; 1 before the first, as nothing was skipped."""
        return self.computed / len(self.entries) if self.entries else 1.0

    @property
    def reasons(self) -> dict[str, int]:
        """How many decisions had each reason, the most frequent first."""
        return dict(Counter(entry.reason for entry in self.entries).most_common())

    def report(self, format: Literal["text", "json"] = "text") -> str:
        """Say what happened, for a reader or as JSON of a fixed form with a version number.

        Raises:
            ValueError: the format is neither.
        """
        if format == "text":
            return "\n".join(self._lines())
        if format == "json":
            return json.dumps(self.as_dict(), indent=2, allow_nan=False)
        raise ValueError(f"format is {format!r}, legal are 'text' and 'json'")

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON report; a number that is not finite is "inf", "-inf" or "nan"."""
        return {
            "version": REPORT_VERSION,
            "computed": self.computed,
            "skipped": self.skipped,
            "share": self.share,
            "flops_share": jsonable(self.flops_share),
            "bytes_now": self.bytes_now,
            "bytes_held": self.bytes_held,
            "reasons": self.reasons,
            "entries": [
                {name: jsonable(value) if isinstance(value, float) else value for name, value in asdict(entry).items()}
                for entry in self.entries
            ],
        }

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw decisions and errors over the steps into an svg or png file, which is replaced.

        Raises:
            PlotError: the suffix is another, or nothing was recorded.
            PlotUnavailable: matplotlib is not installed.
        """
        plot_decisions(path, self.entries)

    def _lines(self) -> list[str]:
        executed = "" if self.flops_share is None else f", {self.flops_share:.1%} of the operations"
        head = f"computed {self.computed} of {len(self.entries)} ({self.share:.1%}){executed}"
        branches = list(dict.fromkeys(entry.branch for entry in self.entries))
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.items())
        rows = [
            *((branch, self._marks(branch)) for branch in branches),
            ("reasons", reasons or "none"),
            ("held", f"at most {_bytes(self.bytes_held)}, now {_bytes(self.bytes_now)}"),
            ("predicted error", _extent([entry.predicted_error for entry in self.entries])),
            ("realised error", _extent([entry.realised_error for entry in self.entries])),
        ]
        rows = [(name, text) for name, text in rows if text]
        width = max(len(name) for name, _ in rows)
        return [head, *(f"{name:{width}}  {text}" for name, text in rows)]

    def _marks(self, branch: str) -> str:
        """One character a step: computed, skipped, or both where a step had several decisions."""
        decisions: dict[int, set[bool]] = {}
        for entry in self.entries:
            if entry.branch == branch:
                decisions.setdefault(entry.step, set()).add(entry.computed)
        return "".join(_mark(decisions.get(step, set())) for step in range(max(decisions) + 1))


def _mark(decisions: set[bool]) -> str:
    if len(decisions) != 1:
        return BOTH if decisions else NEITHER
    return COMPUTED if True in decisions else SKIPPED


def _extent(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    if not known:
        return ""
    return f"mean {math.fsum(known) / len(known):.4g}, at most {max(known):.4g}, over {len(known)}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count} B"
