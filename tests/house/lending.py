"""One environment lends another what both hold in the same version: unpacked and compiled once, there in no time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from packaging.utils import canonicalize_name


def planned(report: Path) -> dict[str, str]:
    """What `pip install --dry-run --report` would install: versions by canonical name."""
    found = [each["metadata"] for each in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {canonicalize_name(metadata["name"]): metadata["version"] for metadata in found}


def lend(wanted: Mapping[str, str], *, lender: Path, borrower: Path) -> None:
    """Put into the environment `borrower` each distribution of `wanted` that `lender` holds in that very version.

    Files become hard links: pip never writes into one, it puts a new one in its place. A distribution that came from a
    path (`-e` among them) is not lent, because its version does not say what it holds.
    """
    [library] = lender.glob("lib/python*/site-packages")
    for distribution in importlib.metadata.distributions(path=[str(library)]):
        same = wanted.get(canonicalize_name(distribution.name)) == distribution.version
        if same and distribution.read_text("direct_url.json") is None:
            for file in distribution.files or ():
                source = Path(os.path.normpath(library / file))
                _lend_file(source.relative_to(lender), lender, borrower)


def _lend_file(file: Path, lender: Path, borrower: Path) -> None:
    source, target = lender / file, borrower / file
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.parent.name == "bin" and (script := source.read_bytes()).startswith(b"#!"):
        # It names its interpreter, which lies in the environment.
        target.write_bytes(script.replace(os.fsencode(lender), os.fsencode(borrower)))
        shutil.copymode(source, target)
    elif not target.exists():  # two distributions may both own a file
        os.link(source, target)
