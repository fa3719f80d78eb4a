"""Reads what npu-smi prints.

Rows are split at ``|``; widths and columns differ from version to version and are never counted. A device has two rows:
``NPU name | health | power temperature hugepages``, then ``chip physical-id | bus-id | use memory HBM``. The 950 puts
the NPU and its name into two cells and has no chip number. What is no such table gives nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

HEALTH = ("OK", "Warning", "Alarm", "Critical", "UNKNOWN")

_USAGE = re.compile(r"(\d{1,9})\s*/\s*(\d{1,9})", re.ASCII)  # "26838/ 32768": a space may be missing
_NUMBER = re.compile(r"\d{1,9}(?:\.\d{1,9})?", re.ASCII)
_HEADER = re.compile(r"\|\s*npu-smi\s+(\S+).*?Version:\s*(\S+)", re.ASCII)
_PHYSICAL = re.compile(r"Phy-ID", re.ASCII)
_CODE = re.compile(r"\bret is (-\d{1,9})", re.ASCII)
_FIELD = re.compile(r"^[ \t]*([^:\r\n|]+?)[ \t]*:[ \t]*([^\r\n]*?)[ \t]*\r?$", re.MULTILINE)


@dataclass(frozen=True)
class Usage:
    """A part of a whole: pages of hugepages, or MB of memory."""

    used: int
    total: int

    @property
    def full(self) -> bool:
        """Whether nothing is left of something."""
        return 0 < self.total <= self.used


@dataclass(frozen=True)
class Chip:
    """One device; what its table does not tell is None.

    Args:
        name: as it is printed: 910B2, Ascend910, 310P3, 950PR.
        health: one of `HEALTH`.
        npu: number of the card.
        chip: number on the card; the 950 has none.
        physical: the number that the card's nodes and hccn_tool use, where the table has it.
        power: W; the second die of an A3 and the 310P print none.
        temperature: degrees Celsius.
        hugepages: pages.
        bus: bus id; the two chips of a 300I Duo share one.
        memory: MB of DDR.
        hbm: MB of HBM; the 310P has none, its memory is DDR.
    """

    name: str
    health: str
    npu: int | None = None
    chip: int | None = None
    physical: int | None = None
    power: float | None = None
    temperature: float | None = None
    hugepages: Usage | None = None
    bus: str = ""
    memory: Usage | None = None
    hbm: Usage | None = None

    @property
    def device_memory(self) -> Usage | None:
        """The memory that models live in: HBM, or DDR where there is no HBM."""
        return self.hbm if self.hbm and self.hbm.total else self.memory

    @property
    def label(self) -> str:
        """How a person finds it: ``3``, or with the chip's number on a card of several ``3.1``."""
        npu = "?" if self.npu is None else str(self.npu)
        return f"{npu}.{self.chip}" if self.chip else npu


@dataclass(frozen=True)
class Process:
    """A process that holds memory of a chip, in MB."""

    npu: int
    chip: int | None
    pid: int
    name: str
    megabytes: int


@dataclass(frozen=True)
class Table:
    """All of ``npu-smi info``.

    Args:
        tool: version of npu-smi.
        driver: version of the driver that runs.
        chips: in the table's order, which is that of their logical ids.
        processes: at most eight a chip are printed.
        physical_ids: whether it has the column Phy-ID, as the A3 does.
    """

    tool: str = ""
    driver: str = ""
    chips: tuple[Chip, ...] = ()
    processes: tuple[Process, ...] = ()
    physical_ids: bool = False


def table(text: str) -> Table:
    """``npu-smi info`` as values; empty for anything else."""
    header = _HEADER.search(text)
    found: list[Chip] = []
    processes: list[Process] = []
    waiting = False  # for the second row of the chip before
    for cells in _rows(text):
        first, process = _first_row(cells), _process(cells)
        if first is not None:
            found.append(first)
            waiting = True
        elif waiting and len(cells) in (3, 4) and re.fullmatch(r"[0-9 ]*", cells[0]):
            found[-1] = _with_second_row(found[-1], cells)
            waiting = False
        elif process is not None:
            processes.append(process)
    return Table(
        tool=header[1] if header else "",
        driver=header[2] if header else "",
        chips=tuple(found),
        processes=tuple(processes),
        physical_ids=bool(_PHYSICAL.search(text)),
    )


def chips(text: str) -> tuple[Chip, ...]:
    """The chips of ``npu-smi info``, in its order."""
    return table(text).chips


def names(text: str) -> tuple[str, ...]:
    """The chip names of ``npu-smi info -m``, without the management chips (Mcu), which no task sees."""
    found = []
    for line in text.splitlines():
        cells = re.split(r"\t+| {2,}", line.strip())
        if len(cells) >= 4 and cells[0].isdigit() and cells[-1] not in ("Mcu", "-", ""):
            found.append(cells[-1])
    return tuple(found)


def values(text: str, field: str) -> tuple[str, ...]:
    """Every value of a field in ``npu-smi info -t …``, which has a block a chip; NA and nothing are left out.

    Hyphens and case are of no account: "Double-bit Error Count" is "Double Bit Error Count".
    """
    wanted = _plain(field)
    return tuple(value for name, value in _FIELD.findall(text) if _plain(name) == wanted and value not in ("", "NA"))


def counts(text: str, ending: str) -> tuple[int, ...]:
    """The numbers of all fields whose name ends so: of HBM and of DDR alike."""
    wanted = _plain(ending)
    return tuple(
        int(value)
        for name, value in _FIELD.findall(text)
        if _plain(name).endswith(wanted) and re.fullmatch(r"[0-9]{1,18}", value)
    )


def codes(text: str) -> tuple[int, ...]:
    """The driver's return codes in an output that has no table: -8005, -8020."""
    return tuple(int(code) for code in _CODE.findall(text))


def _plain(field: str) -> str:
    return " ".join(field.replace("-", " ").lower().split())


def _rows(text: str) -> list[list[str]]:
    lines = (line.strip("\ufeff \t\r") for line in text.splitlines())
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def _first_row(cells: list[str]) -> Chip | None:
    at = next((place for place, cell in enumerate(cells) if place > 0 and cell in HEALTH), None)
    words = " ".join(cells[:at]).split() if at else []
    if at is None or not words or not cells[at - 1]:
        return None
    rest = " ".join(cells[at + 1 :])
    power, temperature = ((*_USAGE.sub("", rest).split(), "", ""))[:2]
    usage = _usages(rest)
    return Chip(
        name=words[-1],
        health=cells[at],
        npu=_int(words[0]) if len(words) > 1 else None,
        power=_float(power),
        temperature=_float(temperature),
        hugepages=usage[0] if usage else None,
    )


def _with_second_row(chip: Chip, cells: list[str]) -> Chip:
    numbers = cells[0].split()
    usage = _usages(cells[-1])
    return replace(
        chip,
        chip=_int(numbers[0]) if numbers else None,
        physical=_int(numbers[1]) if len(numbers) > 1 else None,
        bus=cells[-2],
        memory=usage[0] if usage else None,
        hbm=usage[1] if len(usage) > 1 else None,
    )


def _process(cells: list[str]) -> Process | None:
    numbers = cells[0].split()
    if len(cells) != 4 or not 1 <= len(numbers) <= 2:
        return None
    npu, chip, pid, size = _int(numbers[0]), _int(numbers[-1]), _int(cells[1]), _int(cells[3])
    if npu is None or chip is None or pid is None or size is None:
        return None
    return Process(npu, chip if len(numbers) == 2 else None, pid, cells[2], size)


def _usages(text: str) -> list[Usage]:
    return [Usage(int(used), int(total)) for used, total in _USAGE.findall(text)]


def _int(word: str) -> int | None:
    return int(word) if re.fullmatch(r"[0-9]{1,9}", word) else None


def _float(word: str) -> float | None:
    return float(word) if _NUMBER.fullmatch(word) else None
