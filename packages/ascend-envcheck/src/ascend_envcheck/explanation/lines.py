"""One line of a log: made readable, and what its form tells about rank, time and importance."""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_RANK = re.compile(r"\[(?:rank|default|Rank )(\d{1,6})\]|\bRankID:(\d{1,6})\b")
# The vendor's log reference: yyyy-mm-dd-hh:mm:ss.SSS.uuu; Python's logging puts a blank and a comma.
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[-T ](\d\d:\d\d:\d\d)(?:[.,](\d{3}))?(?:\.?(\d{3}))?")
_LEVEL = re.compile(r"\b(DEBUG|INFO|EVENT|TRACE|WARN|WARNING|ERROR|CRITICAL|FATAL)\b|\b\w*[a-z]Warning: ")
_HEAD = 100  # the level of a line stands near its start
_CODE = re.compile(r"\bE[A-Z]\d{4}\b|\bE[1-9]\d{4}\b: ")
_FAULTY_WORDS = ("ERROR", "FATAL", "CRITICAL", "rror: ", "Error", "Exception")  # a plain search costs a tenth
_FAULTY = re.compile(
    r"\bERROR\b|\bFATAL\b|\bCRITICAL\b|\b[Ee]rror: "
    r"|(?:^|[\s:|>\]])[\w.]*(?:Error|Exception)(?::(?!:)|$)"
)
_RAISED = re.compile(r"^(?:\S*\]:?\s|\([^()]*\)\s)*[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)(?::|$)")

LOUD, WARNING, QUIET = "loud", "warning", "quiet"


def readable(raw: bytes) -> str:
    """The line without colours and without what could steer a terminal; bytes that are no UTF-8 become U+FFFD."""
    text = raw.decode("utf-8", errors="replace")
    if "\x1b" in text:
        text = _COLOURS.sub("", text)
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    return text.rstrip()


def rank_of(text: str) -> str:
    """The rank that wrote the line, or ""."""
    found = _RANK.search(text)
    return (found.group(1) or found.group(2)) if found else ""


def last_time(text: str) -> str:
    """The last time of day in a piece of a log, in a form that sorts, or ""."""
    found = _TIME.findall(text)
    return "{} {}.{}{}".format(*(part or "000" for part in found[-1])) if found else ""


def loudness(text: str) -> str:
    """LOUD, WARNING or QUIET (information and less), by the first level that the head of the line names."""
    found = _LEVEL.search(text[:_HEAD])
    if found is None or found.group(1) in ("ERROR", "CRITICAL", "FATAL"):
        return LOUD
    return WARNING if found.group(1) in (None, "WARN", "WARNING") else QUIET


def looks_faulty(text: str) -> bool:
    """Whether the line looks like an error to one who knows no failure by name."""
    named = any(word in text for word in _FAULTY_WORDS) and _FAULTY.search(text)
    return bool(named or ("E" in text and _CODE.search(text))) and loudness(text) == LOUD


def is_raised(text: str) -> bool:
    """Whether the line looks like the last of a traceback: the exception and its message."""
    return bool(_RAISED.match(text))
