"""Version strings of the field, and the files that hold them.

None of it raises on odd input: what can't be read is None, or not there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Tuple

Release = Tuple[int, int, int]

_RELEASE = re.compile(r"\s*v?(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(?![\d])", re.ASCII)
_CANN = re.compile(
    r"(?<![\d.])(\d{1,3})\.(\d{1,3})(?:\.(\d{1,3}))?(?![\d])"
    r"(?:[.-]?(rc)\.?(\d{1,3}))?(?:[.-]?(alpha|beta)\.?(\d{1,4}))?",
    re.ASCII | re.IGNORECASE,
)
_FINAL = 10_000  # greater than the number of any pre-release
_PAIR = re.compile(r"^[ \t]*([^=:#\r\n]+?)[ \t]*[=:][ \t]*([^\r\n]*?)[ \t]*\r?$", re.MULTILINE)
_PIN = re.compile(r"\s*torch\s*\(?\s*==\s*([^\s;,)]+)", re.IGNORECASE)


def release(version: str) -> Release | None:
    """The first three numbers of a Python version: 2.7.1+cpu is (2, 7, 1), 2.6 is (2, 6, 0), else None."""
    found = _RELEASE.match(version)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def series(version: str) -> str | None:
    """The first two numbers: 26.0.1 is of series 26.0, 8.2.RC1 of 8.2; None without numbers."""
    found = release(version)
    return f"{found[0]}.{found[1]}" if found else None


def cann_version(text: str) -> str | None:
    """The CANN version in a text, in the spelling of the tables: 8.2.RC1, 8.5.0, 8.3.RC1.alpha001, 9.0.0.beta1.

    A build number after it is dropped (8.2.RC1.B150 is 8.2.RC1), a name before it too (cann-8.5.0). None when
    there is none.
    """
    found = _CANN.search(text)
    if not found:
        return None
    parts = [part for part in found.group(1, 2, 3) if part is not None]
    if found[4]:
        parts.append(f"RC{int(found[5])}")
    if found[6]:
        parts.append(found[6].lower() + found[7])
    return ".".join(parts)


def cann_order(version: str) -> tuple[int, ...]:
    """A key by which CANN versions sort: alpha before beta before RC before the release; () for none."""
    found = _CANN.search(version)
    if not found:
        return ()
    number = tuple(int(part or 0) for part in found.group(1, 2, 3))
    candidate = int(found[5]) if found[4] else _FINAL
    early = {"alpha": 0, "beta": 1, "": _FINAL}[(found[6] or "").lower()]
    return (*number, candidate, early, int(found[7] or 0))


def pairs(text: str) -> dict[str, str]:
    """The ``key=value`` and ``key : value`` lines of a version file; keys in lower case, the first one counts."""
    found: dict[str, str] = {}
    for key, value in _PAIR.findall(text):
        found.setdefault(key.lower(), value)
    return found


def torch_pin(requirement: str) -> str | None:
    """The version X of a requirement ``torch==X`` or ``torch (==X)``, None for any other."""
    found = _PIN.match(requirement)
    return found[1] if found else None


def pin_allows(pin: str, version: str) -> bool:
    """Whether ``==pin`` admits a version; local labels (+cpu) are of no account, ``2.13.*`` is a prefix."""
    if pin.endswith(".*"):
        return (version + ".").startswith(pin[:-1])
    wanted, given = release(pin), release(version)
    return wanted is not None and wanted == given


_DRIVER = re.compile(
    r"\s*v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?:\.?(alpha|beta|rc)\.?(\d{1,4}))?((?:\.\d{1,5})*)"
    r"(?:\.?b(\d{1,5}))?(?![\w.])",
    re.ASCII | re.IGNORECASE,
)
_ALPHA, _BETA, _RC, _FINAL_STAGE = 0, 1, 2, 3
_STAGES = {"alpha": _ALPHA, "beta": _BETA, "rc": _RC, "": _FINAL_STAGE}
_LINE_950 = ("25.1", "25.6", "25.7")
_RELEASED = 100_000  # greater than any build number, which has five digits at most


@dataclass(frozen=True, order=True)
class DriverVersion:
    """A driver, firmware package or HDK version, in its order: alpha, beta and builds, rc, final, patch.

    Args:
        number: the three numbers; 25.3.rc1 is of (25, 3, 0).
        stage: 0 alpha, 1 beta or a bare build, 2 rc, 3 final.
        stage_number: 3 of rc3.
        patch: what follows: (7,) of 24.1.rc3.7, (1,) of 25.2.3.1.
        build: 87 of 26.1.0.b087, 999 of 24.1.rc3.b999, which are builds before 26.1.0 and 24.1.rc3.
    """

    number: Release
    stage: int
    stage_number: int
    patch: tuple[int, ...]
    build: int

    @property
    def base(self) -> tuple[Release, int, int]:
        """What its patches and builds have in common."""
        bare_build = self.stage == _BETA and self.stage_number == 0 and self.build < _RELEASED
        return self.number, _FINAL_STAGE if bare_build else self.stage, self.stage_number

    @property
    def line(self) -> str:
        """ "950" for the numbers of the 950's own drivers, else "": versions of two lines have no order."""
        return "950" if f"{self.number[0]}.{self.number[1]}" in _LINE_950 else ""


def driver_version(text: str) -> DriverVersion | None:
    """The version of a driver or HDK: 24.1.rc3.7, 25.2.3.1, 26.1.0.b087; None for any other text."""
    found = _DRIVER.match(text)
    if not found or text[found.end() :].strip():
        return None
    stage = (found[4] or "").lower()
    patch = [int(part) for part in found[6].split(".") if part]
    while patch and patch[-1] == 0:
        patch.pop()
    number = (int(found[1]), int(found[2]), int(found[3] or 0))
    rank = _BETA if found[7] and not stage else _STAGES[stage]
    return DriverVersion(number, rank, int(found[5] or 0), tuple(patch), int(found[7] or _RELEASED))


def is_listed(version: DriverVersion, entry: str) -> bool:
    """Whether a table's entry means it: ``25.5.x`` a series, any other one release with its patches and builds."""
    if entry.lower().endswith(".x"):
        wanted = release(entry[:-2])
        return wanted is not None and wanted[:2] == version.number[:2]
    listed = driver_version(entry)
    return listed is not None and listed.base == version.base


def ranges(text: str) -> list[tuple[str, str]]:
    """The closed ranges of a version file: ``[7.0.0,8.9.9],[24.1,24.1.]``."""
    return [(low.strip(), high.strip()) for low, high in re.findall(r"\[([^\[\],]*),([^\[\],]*)\]", text)]


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with: (7, 7, 0, 1, 231), (24, 1) of 24.1.rc3; () without any."""
    found = re.match(r"\s*v?(\d{1,9}(?:\.\d{1,9})*)", version, re.ASCII)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def is_within(version: str, low: str, high: str) -> bool:
    """Whether a version lies in a closed range; a bound counts to its own length (8.9.9 admits 8.9.9.1.231)."""
    given, first, last = numbers(version), numbers(low), numbers(high)
    return bool(given and first and last) and first <= given[: len(first)] and given[: len(last)] <= last
