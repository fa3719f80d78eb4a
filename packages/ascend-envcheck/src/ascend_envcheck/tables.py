"""Which versions fit together: the package's own tables, each row with its source and how sure it is.

``confidence``: *official* is printed by the vendor; *official-history* was printed once and is gone;
*derived* follows from a release tag; *inferred* is a guess that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Mapping

from ascend_envcheck.versions import cann_version, release, series

DATA_DATE = "2026-08-22"
"""The day up to which the sources were read; versions made later are unknown, not wrong."""


@dataclass(frozen=True)
class TorchNpuRow:
    """A torch_npu build: what it was made for.

    Args:
        torch: the torch release, exact.
        torch_npu: the build; unique in the table.
        cann: the CANN version of the same train; "" when no source names it.
        release: the TorchNPU train, 26.0.1.
        status: general, patch, pre-release, or unlisted (seen on PyPI, in no list of the vendor).
        python_documented: the span that the vendor documents, 3.10-3.13.
        python_wheels: the versions that PyPI has wheels for; () when it has none.
        confidence: see the top of this file.
        source: where the row comes from.
    """

    torch: str
    torch_npu: str
    cann: str
    release: str
    status: str
    python_documented: str
    python_wheels: tuple[str, ...]
    confidence: str
    source: str

    @property
    def note(self) -> str:
        """Source and confidence, for the foot of a finding."""
        return f"{self.source} ({self.confidence})"

    def supports(self, python: str) -> bool:
        """Whether the vendor documents, or PyPI has a wheel for, this Python (``3.11``)."""
        first, _, last = self.python_documented.partition("-")
        low, given, high = release(first), release(python), release(last)
        documented = None not in (low, given, high) and low <= given <= high  # type: ignore[operator]
        return documented or python in self.python_wheels


@dataclass(frozen=True)
class Pairing:
    """A row of a table that only says: this series goes with that one."""

    of: str
    fits: str
    confidence: str
    source: str


@lru_cache(maxsize=None)
def _lines(name: str) -> tuple[tuple[str, ...], ...]:
    import csv  # needed once torch_npu or torchvision is installed, not before
    import pkgutil

    raw = pkgutil.get_data("ascend_envcheck", f"data/{name}.csv")
    assert raw is not None, f"the installed package lacks data/{name}.csv"
    return tuple(tuple(row) for row in csv.reader(raw.decode("utf-8").splitlines()))


def _rows(name: str) -> tuple[tuple[str, ...], ...]:
    return _lines(name)[1:]


@lru_cache(maxsize=None)
def torch_npu_rows() -> tuple[TorchNpuRow, ...]:
    """All rows, newest first."""
    return tuple(_torch_npu_row(*row) for row in _rows("torch_npu"))


def _torch_npu_row(
    torch: str, torch_npu: str, cann: str, train: str, status: str, documented: str, wheels: str, *origin: str
) -> TorchNpuRow:
    confidence, source = origin
    return TorchNpuRow(torch, torch_npu, cann, train, status, documented, tuple(wheels.split()), confidence, source)


@lru_cache(maxsize=None)
def records(name: str) -> tuple[Mapping[str, str], ...]:
    """The rows of ``data/NAME.csv`` by the names of its columns; every table has ``confidence`` and ``source``."""
    head, *rows = _lines(name)
    return tuple(dict(zip(head, row)) for row in rows)


def pairings(name: str) -> tuple[Pairing, ...]:
    """The rows of ``cross`` (TorchNPU train, CANN) or ``torchvision`` (torch, torchvision)."""
    return tuple(Pairing(*row) for row in _rows(name))


@lru_cache(maxsize=None)
def known_canns() -> frozenset[str]:
    """Every released or pre-released CANN version that a table names."""
    named = [row.cann for row in torch_npu_rows()]
    named += [row["cann"] for name in ("vllm_ascend", "mindie_sd", "triton_ascend") for row in records(name)]
    named += [row["toolkit"] for row in records("ops_toolkit")]
    return frozenset(cann for cann in named if cann)


def find_torch_npu(version: str) -> TorchNpuRow | None:
    """The row of an installed torch_npu; a local label (+git…) is of no account."""
    by_version: dict[str, TorchNpuRow] = {row.torch_npu: row for row in torch_npu_rows()}
    return by_version.get(version.partition("+")[0].strip())


def builds_for(torch: str, cann: str | None = None) -> list[TorchNpuRow]:
    """Released builds on PyPI for a torch release and, where given, a CANN version; newest first."""
    return [
        row
        for row in torch_npu_rows()
        if release(row.torch) == release(torch)
        and (cann is None or cann_version(row.cann) == cann)
        and row.status in ("general", "patch")
        and row.python_wheels
    ]


def cross_pairing(row: TorchNpuRow, cann: str) -> Pairing | None:
    """The vendor's statement that a whole TorchNPU series runs on a whole CANN series, if there is one."""
    wanted = (series(row.release), series(cann))
    return next((pair for pair in pairings("cross") if (pair.of, pair.fits) == wanted), None)


WHEELS = "https://download.pytorch.org/whl"
"""PyTorch's own indexes, one for each label of a build: +cpu, +cu121."""

CPU_INDEX = f"{WHEELS}/cpu"
"""The only one that has builds with the label +cpu."""


def torch_requirement(row: TorchNpuRow, machine: str) -> str:
    """The torch that the wheels of a torch_npu ask for: torch==X+cpu on x86-64 up to torch 2.11, else torch==X."""
    labelled = machine == "x86_64" and (release(row.torch) or (0, 0, 0)) < (2, 12, 0)
    return f"torch=={row.torch}+cpu" if labelled else f"torch=={row.torch}"


def pip_install(row: TorchNpuRow, machine: str, *also: str) -> str:
    """The pip line of a pair of torch and torch_npu, with more requirements where given."""
    torch = torch_requirement(row, machine)
    index = f" --extra-index-url {CPU_INDEX}" if torch.endswith("+cpu") else ""
    return " ".join(("pip install", torch, f"torch_npu=={row.torch_npu}", *also)) + index
