"""Versions as people type them, and what they stand for in the tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, Iterable, Mapping

from ascend_envcheck.errors import VersionError
from ascend_envcheck.tables import known_canns, records, torch_npu_rows
from ascend_envcheck.versions import cann_order, cann_version, driver_version, is_listed, release, series

LABELS: Mapping[str, str] = {
    "torch": "torch",
    "torch_npu": "torch_npu",
    "cann": "CANN",
    "python": "Python",
    "hdk": "HDK",
    "mindspeed_mm": "MindSpeed-MM",
    "mindie_sd": "MindIE-SD",
    "soc": "SoC",
    "machine": "machine",
}
"""What may be fixed, by its name among the people who use it."""

MACHINES: Mapping[str, str] = {
    "x86_64": "x86_64",
    "amd64": "x86_64",
    "x64": "x86_64",
    "x86-64": "x86_64",
    "aarch64": "aarch64",
    "arm64": "aarch64",
}

SOCS: tuple[str, ...] = ("ascend910b", "ascend910_93", "ascend310p", "ascend910", "ascend310b", "ascend950")
"""The names of the platforms in CANN; 910B and A2 are ascend910b, A3 is ascend910_93."""

_NEAR = 5  # how many known versions are named beside an unknown one


@dataclass(frozen=True)
class Asked:
    """One value that was fixed.

    Args:
        name: a key of `LABELS`.
        text: as it was typed.
        values: what it stands for in the tables; () when they don't know it.
        guessed: those of the values that only are of its series.
    """

    name: str
    text: str
    values: tuple[str, ...]
    guessed: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """CANN 8.2.RC1: the one value that it stands for, else what was typed."""
        shown = self.values[0] if len(self.values) == 1 and not self.guessed else self.text.strip()
        return f"{LABELS[self.name]} {shown}"

    def nearest(self) -> tuple[str, ...]:
        """The known versions that come closest, the closest first."""
        wanted = cann_order(self.text)
        if not wanted:
            return known(self.name)[:_NEAR]
        return tuple(sorted(known(self.name), key=lambda version: _distance(cann_order(version), wanted))[:_NEAR])


def _distance(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(abs(first - second) for first, second in zip(one, other))


def asked(name: str, text: str) -> Asked:
    """What a typed value stands for: the version itself, else all that begin like it (8.5 is 8.5.0, 8.5.1, …).

    Raises:
        VersionError: the text is no version (or no machine, no SoC).
    """
    if name == "machine":
        return _named(name, text, MACHINES.get(text.strip().lower()), tuple(sorted(set(MACHINES.values()))))
    if name == "soc":
        return _named(name, text, soc_of(text), SOCS)
    if name == "hdk":
        return _hdk(text)
    spelled = _SPELLING[name](text.strip())
    if spelled is None:
        raise VersionError(f"{text!r} is no version of {LABELS[name]}; one is {known(name)[0]}")
    if name == "torch_npu":
        return Asked(name, text, _builds(spelled))
    return Asked(name, text, (spelled,) if spelled in known(name) else _beginning_with(spelled, known(name)))


def _hdk(text: str) -> Asked:
    """A listed HDK, by itself or within its series; a driver of another number is taken for one of its series."""
    version = driver_version(text)
    if version is None:
        raise VersionError(f"{text!r} is no version of HDK; one is {known('hdk')[0]}")
    listed = tuple(entry for entry in known("hdk") if is_listed(version, entry))
    alike = tuple(entry for entry in known("hdk") if series(entry) == series(text) and entry not in listed)
    if re.match(r"\s*v?\d+\.\d+\s*$", text):
        return Asked("hdk", text, listed + alike)  # the series was meant
    return Asked("hdk", text, listed or alike, guessed=() if listed else alike)


def _named(name: str, text: str, found: str | None, legal: tuple[str, ...]) -> Asked:
    if found is None:
        raise VersionError(f"{text!r} is no {LABELS[name]} that this tool knows; it knows {', '.join(legal)}")
    return Asked(name, text, (found,))


def soc_of(text: str) -> str | None:
    """The platform of a chip by one of its names: 910B2, Ascend910B, Ascend310P3, A3; None for another text."""
    plain = re.sub(r"[^a-z0-9]", "", text.lower()).replace("ascend", "")
    for start, soc in (
        ("91093", "ascend910_93"),
        ("a3", "ascend910_93"),
        ("910b", "ascend910b"),
        ("a2", "ascend910b"),
        ("910c", "ascend910_93"),
        ("910", "ascend910"),
        ("310p", "ascend310p"),
        ("310b", "ascend310b"),
        ("950", "ascend950"),
    ):
        if plain.startswith(start):
            return soc
    return None


def _beginning_with(start: str, versions: Iterable[str]) -> tuple[str, ...]:
    return tuple(version for version in versions if re.match(re.escape(start) + r"(?![0-9])", version))


def covers(listed: str, version: str) -> bool:
    """Whether a listed series, ``8.2.x``, holds a CANN version."""
    return listed.endswith(".x") and series(listed) == series(version)


def _builds(spelled: str) -> tuple[str, ...]:
    """By build; else by train, since people say torch_npu 7.1.0 for TorchNPU 7.1.0; else all of a series."""
    rows = torch_npu_rows()
    for found in (
        tuple(row.torch_npu for row in rows if row.torch_npu == spelled),
        tuple(row.torch_npu for row in rows if row.release.lower() == spelled),
        _beginning_with(spelled, (row.torch_npu for row in rows)),
    ):
        if found:
            return found
    return ()


def _spell_torch(text: str) -> str | None:
    found = re.match(r"v?(\d+(?:\.\d+){1,2})(?:\.?(?:dev|a|b|rc)\d+)?(?:\+.*)?$", text, re.IGNORECASE | re.ASCII)
    return found[1] if found else None


def _spell_torch_npu(text: str) -> str | None:
    found = re.match(
        r"v?(\d+(?:\.\d+){1,3})(?:[.-]?(post|rc|dev)\.?(\d+))?(\.\d+)?(?:\+.*)?$", text, re.IGNORECASE | re.ASCII
    )
    if not found:
        return None
    kind = (found[2] or "").lower()
    if not kind:
        return found[1]
    dot = "." if kind in ("post", "dev") or (release(found[1]) or (0, 0, 0)) >= (5, 0, 0) else ""  # 2.7.1rc1, 6.0.rc3
    return f"{found[1]}{dot}{kind}{found[3]}{found[4] or ''}"


def _spell_cann(text: str) -> str | None:
    return cann_version(re.sub(r"(?<=\d)(?=rc|alpha|beta)", ".", text, flags=re.IGNORECASE))


def _spell_python(text: str) -> str | None:
    found = re.match(r"(?:cpython|python|cp|py)?[ -]?3\.?(\d{1,2})(?:\.\d+\S*)?$", text, re.IGNORECASE | re.ASCII)
    return f"3.{int(found[1])}" if found else None


def _spell_release(text: str) -> str | None:
    found = re.match(r"v?(\d+(?:\.\d+){0,2})", text, re.IGNORECASE | re.ASCII)
    return found[1] if found else None


_SPELLING: Mapping[str, Callable[[str], str | None]] = {
    "torch": _spell_torch,
    "torch_npu": _spell_torch_npu,
    "cann": _spell_cann,
    "python": _spell_python,
    "mindspeed_mm": _spell_release,
    "mindie_sd": _spell_release,
}


@lru_cache(maxsize=None)
def known(name: str) -> tuple[str, ...]:
    """All versions in the tables, newest first; of HDK also whole series, as the vendor names them (25.5.x)."""
    if name == "torch":
        found = [row.torch for row in torch_npu_rows()]
    elif name == "torch_npu":
        return tuple(row.torch_npu for row in torch_npu_rows())
    elif name == "cann":
        found = [row.cann for row in torch_npu_rows() if row.cann]
        found += [version for record in records("mindspeed_mm") for version in record["cann"].split()]
        found += [record["cann"] for record in records("hdk") if not record["cann"].endswith(".x")]
        found += known_canns()
    elif name == "python":
        found = [f"3.{minor}" for minor in range(8, 20)]
        found = [version for version in found if any(row.supports(version) for row in torch_npu_rows())]
    elif name == "hdk":
        found = [version for record in records("hdk") for version in record["hdk"].split()]
    elif name == "soc":
        return SOCS
    else:
        found = [record[name] for record in records(name)]
    return tuple(sorted(dict.fromkeys(found), key=cann_order, reverse=True))
