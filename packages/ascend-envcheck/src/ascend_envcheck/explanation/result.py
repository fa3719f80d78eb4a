"""What `explain` returns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ascend_envcheck.failures import INFO, ROOT, Failure

EXPLAINED, UNKNOWN, NO_ERROR = "explained", "unknown", "no error"


@dataclass(frozen=True)
class Place:
    """A line of a log.

    Args:
        file: the name of the log; "" where there is one without a name.
        line: its number from 1.
        rank: the rank that wrote it, as far as the line says.
        time: when it was written, in a form that sorts; "" where no line near it says.
        text: the line, printable, cut where it is long.
    """

    file: str
    line: int
    rank: str
    time: str
    text: str


@dataclass(frozen=True)
class Found:
    """A failure that the log names.

    Args:
        failure: what it is: cause, fix, source.
        tier: root, wrapper, generic or info; lower than that of the failure where the line is only a warning.
        first: the line that said it first.
        count: how many lines said it.
        follows: the id of the root that most likely made it happen; "" for a root, or where the log has none.
    """

    failure: Failure
    tier: str
    first: Place
    count: int
    follows: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, in English."""
        failure = self.failure
        return {
            "id": failure.id,
            "tier": self.tier,
            "category": failure.category,
            "cause": str(failure.cause),
            "fix": str(failure.fix),
            "source": failure.source,
            "confidence": failure.confidence,
            **vars(self.first),
            "count": self.count,
            "follows": self.follows,
        }


@dataclass(frozen=True)
class Explanation:
    """What a log says.

    Args:
        found: roots, then wrappers, then what is generic, then what is only worth knowing; each in the order of the
            log, and across logs in that of time where all of them tell it.
        unknown: lines that look like errors and that nothing explains: the first ones, and the end of the last
            traceback.
        lines: how many lines were read.
    """

    found: tuple[Found, ...]
    unknown: tuple[Place, ...]
    lines: int

    @property
    def cause(self) -> Found | None:
        """The most likely cause, or None where the log names none."""
        return self.found[0] if self.found and self.found[0].tier == ROOT else None

    @property
    def status(self) -> str:
        """ "explained", "unknown" (there are errors, and all are unknown), or "no error"."""
        if any(found.tier != INFO for found in self.found):
            return EXPLAINED
        return UNKNOWN if self.unknown else NO_ERROR

    def to_dict(self) -> dict[str, Any]:
        """As plain values, in English."""
        return {
            "schema_version": 1,
            "status": self.status,
            "lines": self.lines,
            "found": [found.to_dict() for found in self.found],
            "unknown": [dict(vars(place)) for place in self.unknown],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text, ending in a newline."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
