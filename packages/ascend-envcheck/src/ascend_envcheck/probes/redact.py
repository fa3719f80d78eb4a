"""What must not leave the machine with a snapshot.

The home folder becomes ``~``. Addresses, serial numbers and the like become tokens such as ``ip4-1f3a9c27`` from a hash
with a salt of this one snapshot, so that the same address is the same token within a file, and not in another file.
Values of variables that are named like secrets, and names and passwords in URLs, are masked.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any, Callable, Iterable, Mapping, Match

from ascend_envcheck.snapshot import Snapshot

MASKED = "***"

_WITHOUT_ADDRESSES = ("files", "distributions", "python", "tool_version")  # version strings look like addresses
_WITH_ADDRESSES = re.compile(r"hccn\.conf$|\.json$")  # files that hold addresses all the same
_SECRET = re.compile(r"(^|_)(API_?)?(KEY|TOKEN|SECRET|PASS\w*|CREDENTIALS?)(_|$)", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_IP4 = re.compile(r"(?<![\w.\-])(?:\d{1,3}\.){3}\d{1,3}(?![\w\-]|\.\d)", re.ASCII)
_AFTER_VERSION = re.compile(r"version\s*[:=(]?\s*$", re.IGNORECASE)
_IP6 = re.compile(r"(?<![\w:.])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:.])", re.IGNORECASE | re.ASCII)
_MAC = re.compile(  # the second form is how systemd names an interface by its address: enx9c69d1001122
    r"(?<![\w:])(?:[0-9a-f]{2}:){5}[0-9a-f]{2}(?![\w:])|(?<=\benx)[0-9a-f]{12}\b", re.IGNORECASE | re.ASCII
)
_UUID = re.compile(r"(?<!\w)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?!\w)", re.IGNORECASE | re.ASCII)
_SERIAL = re.compile(r"((?:serial number|die id|uuid)\s*[:=]\s*)(\S[^\r\n|]*)", re.IGNORECASE)
_SHORTEST_NAME = 3  # a shorter user name is a part of everything
_NO_SECRET_NAMES = ("root", "HwHiAiUser", "ascend", "admin", "user", "ubuntu", "python", "torch")
_PUBLIC_IP4 = ("0.0.0.0", "127.0.0.1", "255.255.255.255")


def users(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the person: a service may set none, and under sudo they are those of two."""
    of_home = re.match(r"/(?:home|Users)/([^/]+)", environ.get("HOME", ""))
    named = [environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER")]
    return tuple(dict.fromkeys(filter(None, [*named, of_home[1] if of_home else ""])))


def redact(snapshot: Snapshot, *, home: str, users: Iterable[str] = (), salt: bytes | None = None) -> Snapshot:
    """The snapshot without what identifies a user or a machine.

    Args:
        snapshot: as it was seen.
        home: the user's home folder, written ``~`` in every text, keys included.
        users: the user's names, written ``<user>`` in every text but version files.
        salt: of the hashes; random by default, and kept nowhere.
    """
    import os

    tokens = _Tokens(os.urandom(16) if salt is None else salt)
    facts = {name: _in_field(name, value, tokens) for name, value in asdict(snapshot).items()}
    facts["variables"] = {name: MASKED if _SECRET.search(name) else value for name, value in facts["variables"].items()}
    facts = _without_home(facts, home)
    for user in users:
        facts = _without_user(facts, user)
    return Snapshot.from_json(json.dumps(facts))


class _Tokens:
    def __init__(self, salt: bytes) -> None:
        self._salt = salt

    def of(self, kind: str, text: str) -> str:
        import hashlib

        return f"{kind}-{hashlib.sha256(self._salt + text.lower().encode()).hexdigest()[:8]}"

    def in_text(self, text: str) -> str:
        """The text with a token for whatever identifies."""
        text = _USER_IN_URL.sub(f"{MASKED}@", text)
        text = _SERIAL.sub(lambda found: found[1] + self.of("id", found[2].strip()), text)
        for kind, pattern in (("id", _UUID), ("mac", _MAC)):
            text = pattern.sub(lambda found, kind=kind: self.of(kind, found[0]), text)  # type: ignore[misc]
        text = _IP6.sub(self._ip6, text)
        return _IP4.sub(self._ip4, text)

    def _ip6(self, found: Match[str]) -> str:
        import ipaddress

        try:  # a time of day looks alike
            address = ipaddress.IPv6Address(found[0])
        except ValueError:
            return found[0]
        return found[0] if address.is_unspecified or address.is_loopback else self.of("ip6", found[0])

    def _ip4(self, found: Match[str]) -> str:
        version = _AFTER_VERSION.search(found.string[max(0, found.start() - 24) : found.start()])
        mask = found[0].startswith("255.")
        if version or mask or found[0] in _PUBLIC_IP4 or any(int(part) > 255 for part in found[0].split(".")):
            return found[0]
        return self.of("ip4", found[0])


def _in_field(name: str, value: Any, tokens: _Tokens) -> Any:
    if name == "files":
        return {path: tokens.in_text(text) if _WITH_ADDRESSES.search(path) else text for path, text in value.items()}
    return value if name in _WITHOUT_ADDRESSES else _mapped(value, tokens.in_text)


def _without_home(facts: Any, home: str) -> Any:
    name = home.rstrip("/")
    if len(name) < 2:  # a home of "/" would turn every path into nonsense
        return facts
    pattern = re.compile(rf"(?<![\w.\-]){re.escape(name)}(?![\w.\-])")
    return _mapped(facts, lambda text: pattern.sub("~", text))


def _without_user(facts: dict[str, Any], user: str) -> dict[str, Any]:
    if len(user) < _SHORTEST_NAME or user in _NO_SECRET_NAMES:
        return facts
    pattern = re.compile(rf"(?<![\w]){re.escape(user)}(?![\w])")

    def hidden(text: str) -> str:
        return pattern.sub("<user>", text)

    told = {name: value if name in _WITHOUT_ADDRESSES else _mapped(value, hidden) for name, value in facts.items()}
    paths = {name: hidden(told["python"][name]) for name in ("executable", "on_path")}
    files = {hidden(path): text for path, text in told["files"].items()}  # rules look them up by paths of other fields
    return {**told, "python": {**told["python"], **paths}, "files": files}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return value
