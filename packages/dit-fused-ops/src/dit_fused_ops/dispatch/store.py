"""Decisions kept on disk: one JSON file that many processes share and that can be shipped.

```
{"format": 1, "decisions": {"<op> | <device> | <call> | <versions>": {"ranking": [["<backend>", <microseconds>], …],
                                                                      "rejected": {"<backend>": "<reason>"}}}}
```
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from dit_fused_ops.errors import TuningFileError

FORMAT = 1
VARIABLE = "DIT_FUSED_OPS_TUNING"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was measured for one kind of call.

    Attributes:
        ranking: backends with their median time in microseconds, the fastest first.
        rejected: backends that failed or computed something wrong, with the reason.
        lasting: whether it holds for other processes too; memory that was short does not.
    """

    ranking: tuple[tuple[str, float], ...]
    rejected: Mapping[str, str] = field(default_factory=dict)
    lasting: bool = True


def default_path() -> Path | None:
    """Return `$DIT_FUSED_OPS_TUNING`, or `dit-fused-ops/tuning.json` in the user's cache; None without a home."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user id without a home, as in some containers
        return None
    return Path(cache) / "dit-fused-ops" / "tuning.json"


def read_decisions(path: Path) -> dict[str, Decision]:
    """Read a tuning file; a file that does not exist holds nothing.

    Raises:
        TuningFileError: it cannot be read, or it is not a tuning file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}, this version reads {FORMAT}")
        return {str(key): _decision(value) for key, value in document["decisions"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuningFileError(f"{path} is not a tuning file: {error!r}; remove it, or tune again") from error


def _decision(value: Any) -> Decision:
    ranking = tuple((str(name), float(time)) for name, time in value["ranking"])
    return Decision(ranking=ranking, rejected={str(k): str(v) for k, v in value["rejected"].items()})


class Store:
    """The decisions of this process, read once, and written through to the file.

    Writers take a lock beside the file, read what others have written meanwhile, add their decision and replace the
    file in one step: readers need no lock, and nobody's decision is lost. A file that cannot be read is ignored with
    one warning and replaced at the next write; a folder that cannot be written costs one warning, and the decisions
    last as long as the process.

    Args:
        path: the file; None keeps decisions in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._decisions: dict[str, Decision] | None = None
        self._writable = path is not None
        self._warned = False

    def get(self, key: str) -> Decision | None:
        """Return what is known of `key`."""
        if self._decisions is None:
            self._decisions = self._read()
        return self._decisions.get(key)

    def put(self, key: str, decision: Decision) -> None:
        """Remember `decision`, here and in the file."""
        self.get(key)
        assert self._decisions is not None
        self._decisions[key] = decision
        # Where nothing was right the machine may be ill, or the numbers: no reason to tell others.
        if self._writable and decision.ranking and decision.lasting:
            try:
                self._write_through(key, decision)
            except OSError as error:
                self._writable = False
                self._warn(f"decisions cannot be kept in {self.path} ({error}); they last as long as this process")

    def _write_through(self, key: str, decision: Decision) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            decisions = {**self._read(), key: decision}
            write_decisions(self.path, decisions)
        self._decisions = decisions

    def _read(self) -> dict[str, Decision]:
        if self.path is None:
            return {}
        try:
            return read_decisions(self.path)
        except TuningFileError as error:
            self._warn(f"{error}. It is ignored, and replaced when something is measured")
            return {}

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def write_decisions(path: Path, decisions: Mapping[str, Decision]) -> None:
    """Replace the file `path` in one step."""
    document = {
        "format": FORMAT,
        "decisions": {
            key: {"ranking": [list(pair) for pair in value.ranking], "rejected": dict(value.rejected)}
            for key, value in sorted(decisions.items())
        },
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
