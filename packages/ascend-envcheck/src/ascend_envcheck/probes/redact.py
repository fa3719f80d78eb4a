"""What must not leave the machine with a snapshot."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any, Pattern

from ascend_envcheck.snapshot import Snapshot


def redact(snapshot: Snapshot, *, home: str) -> Snapshot:
    """The snapshot with the user's home folder written ``~`` in every text, keys included."""
    name = home.rstrip("/")
    if len(name) < 2:  # a home of "/" would turn every path into nonsense
        return snapshot
    pattern = re.compile(rf"(?<![\w.\-]){re.escape(name)}(?![\w.\-])")
    return Snapshot.from_json(json.dumps(_replace(asdict(snapshot), pattern)))


def _replace(value: Any, pattern: Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub("~", value)
    if isinstance(value, dict):
        return {pattern.sub("~", key): _replace(item, pattern) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(item, pattern) for item in value]
    return value
