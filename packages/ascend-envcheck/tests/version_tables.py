"""The version tables read once more, by the plainest code there is: what `solve` is compared with.

Nothing of the package is used here, not even its order of versions.
"""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path
from typing import Iterator

import ascend_envcheck

DATA = Path(ascend_envcheck.__file__).parent / "data"
PYTHONS = [f"3.{minor}" for minor in range(8, 15)]
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    with (DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


BUILDS, CROSS, HDK, MM = rows("torch_npu"), rows("cross"), rows("hdk"), rows("mindspeed_mm")
BY_BUILD = {row["torch_npu"]: row for row in BUILDS}
CANNS = sorted({row["cann"] for row in BUILDS if row["cann"]} | {"8.5.1", "8.5.2", "9.0.1"})
"""Those that a torch_npu was made for, and the patches that MindIE-SD's and CANN's own notes add."""


def two_numbers(version: str) -> str:
    return ".".join(version.split(".")[:2])


def runs_on(build: Row, cann: str) -> bool:
    """Made for it, or the release notes let the two series mix."""
    mixed = any(
        (row["release_series"], row["cann_series"]) == (two_numbers(build["release"]), two_numbers(cann))
        for row in CROSS
    )
    return build["cann"] == cann or mixed


def minor(python: str) -> int:
    return int(python.split(".")[1])


def takes(build: Row, python: str) -> bool:
    """By the vendor's span, or by a wheel."""
    first, _, last = build["python_documented"].partition("-")
    documented = bool(first) and minor(first) <= minor(python) <= minor(last)
    return documented or python in build["python_wheels"].split()


def drivers(cann: str) -> set[str] | None:
    """The HDKs of a CANN: its own row, else that of its series; None where there is neither."""
    for wanted in (cann, f"{two_numbers(cann)}.x"):
        for row in HDK:
            if row["cann"] == wanted:
                return set(row["hdk"].split())
    return None


def pairs(torch: str = "", torch_npu: str = "", cann: str = "", python: str = "") -> Iterator[tuple[str, str]]:
    """Every legal torch_npu and CANN, by trying all."""
    for build, toolkit in product(BUILDS, CANNS):
        if (
            build["torch"] == (torch or build["torch"])
            and build["torch_npu"] == (torch_npu or build["torch_npu"])
            and toolkit == (cann or toolkit)
            and runs_on(build, toolkit)
            and any(takes(build, version) for version in PYTHONS if version == (python or version))
        ):
            yield build["torch_npu"], toolkit
