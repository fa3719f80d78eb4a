"""Version strings of the field, and the files that hold them.

None of it raises on odd input: what can't be read is None, or not there.
"""

from __future__ import annotations

import re
from typing import Tuple

Release = Tuple[int, int, int]

_RELEASE = re.compile(r"\s*v?(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(?![\d])", re.ASCII)
_CANN = re.compile(
    r"(?<![\d.])(\d{1,3})\.(\d{1,3})(?:\.(\d{1,3}))?(?![\d])"
    r"(?:[.-]?(rc)\.?(\d{1,3}))?(?:[.-]?(alpha|beta)\.?(\d{1,4}))?",
    re.ASCII | re.IGNORECASE,
)
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
