"""What a conversion leaves in writing: a manifest in the finished folder, a journal while it runs.

Digests are CRC-32: the zip format needs one of every tensor anyway, so they cost no second pass over the bytes. They
find damage, not malice. Sources are recorded by size and a fingerprint of the header and of samples all over the file:
it tells two models of the same shapes apart, and not every change of a byte, so a run that goes on also asks for the
same time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm_convert.errors import OutputExistsError
from mm_convert.plans import Plan, Ref
from mm_convert.stored import StoredFile

MANIFEST = "manifest.json"
FORMAT = 1


def manifest(
    plan: Plan, sources: Iterable[StoredFile], options: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The manifest but for the outputs' digests: a function of contents alone, the same on every machine.

    Args:
        plan: the conversion.
        sources: the files that are read.
        options: what the user chose.
        sizes: bytes of each file that is made.
    """
    from importlib.metadata import version

    return {
        "format": FORMAT,
        "mm_convert": version("mm-convert"),
        "options": dict(options),
        "bytes": plan.nbytes,
        "sources": {short_name(s.path): {"size": s.size, "fingerprint": s.digest} for s in sources},
        "outputs": {file: {"size": size} for file, size in sizes.items()},
    }


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A folder's manifest, if it has one that can be read."""
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("outputs"), dict) else None


def with_digests(made: Mapping[str, Any], crcs: Mapping[Ref, int], names: Mapping[str, str]) -> bytes:
    """The manifest's text.

    Args:
        made: from :func:`manifest`.
        crcs: CRC-32 of each tensor's bytes.
        names: the outputs' names in the folder by their names in the plan.
    """
    outputs: dict[str, Any] = {file: {**entry, "crc32": {}} for file, entry in made["outputs"].items()}
    for ref, crc in sorted(crcs.items()):
        outputs[names[ref.file]]["crc32"]["/".join(filter(None, (ref.section, ref.name)))] = f"{crc:08x}"
    return (json.dumps({**made, "outputs": outputs}, indent=1, ensure_ascii=False) + "\n").encode()


def is_finished(target: Path, expected: Mapping[str, Any], sources: Iterable[StoredFile]) -> bool:
    """Whether the folder is what this conversion would make, from sources that have not been touched since."""
    path = target / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        outputs = {file: {"size": entry["size"]} for file, entry in found["outputs"].items()}
        same = {**found, "outputs": outputs} == expected
        whole = all((target / file).stat().st_size == entry["size"] for file, entry in outputs.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    made = path.stat().st_mtime_ns
    # The time of status change cannot be set back: a file put in the place of another has a new one.
    return same and whole and all(max(s.mtime_ns, s.path.stat().st_ctime_ns) <= made for s in sources)


class Journal:
    """The tensors that stand complete in an unfinished folder, one line a job, first line: of which conversion.

    Args:
        path: the file; what it says already is in `done`.
        expected: from :func:`manifest`.
        sources: the files that are read.

    Raises:
        OutputExistsError: the file belongs to another conversion.
    """

    def __init__(self, path: Path, expected: Mapping[str, Any], sources: Iterable[StoredFile]) -> None:
        times = [[short_name(s.path), s.mtime_ns] for s in sources]
        digest = hashlib.sha256(json.dumps([expected, times], sort_keys=True).encode()).hexdigest()
        self._path, self._lock = path, threading.Lock()
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        if len(lines) > 1 and lines[0].decode("ascii", "replace") != digest:
            raise OutputExistsError(
                f"{path.parent} was left by another conversion (other options, or the sources changed since); run"
                " without --resume to begin anew"
            )
        self.done: dict[Ref, int] = {}
        # The last part is empty, or a line that was broken off.
        for line in lines[1:-1]:
            self.done.update({Ref(*ref): crc for ref, crc in json.loads(line)})
        if len(lines) < 2:
            path.write_text(digest + "\n")
        else:
            os.truncate(path, path.stat().st_size - len(lines[-1]))

    def add(self, crcs: Mapping[Ref, int]) -> None:
        """Record a job's tensors, whose bytes are written."""
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps(list(crcs.items())) + "\n")
        self.done.update(crcs)


def short_name(path: Path) -> str:
    """Enough of a file's path to tell a rank's file from another's, and nothing of the machine."""
    return f"{path.parent.name}/{path.name}" if path.parent.name.startswith("mp_rank_") else path.name
