"""Everything this package raises on purpose.

::

    DataFormatError
    ├── FormatError (ValueError)         the format is unknown, or cannot be told from the first record
    ├── ParseError (ValueError)          the file is not the JSON it should be, or ends too early
    ├── RecordError (ValueError)         one record breaks the rules of its format
    ├── BadSamplesError (ValueError)     a conversion was refused: samples have problems (``.report``)
    ├── ResumeError (ValueError)         a conversion cannot go on: its source or its options have changed
    ├── MissingPackageError (ImportError) an optional package is needed to read this file
    ├── OptionError (ValueError)         an argument is out of its range
    ├── FolderError (NotADirectoryError) a folder that was named does not exist
    └── TargetError (FileExistsError)    the output file may not be written

All can be caught as :class:`DataFormatError` or as the built-in type beside them. A new class is a built-in type as
well, survives pickling and is exported by the package.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report


class DataFormatError(Exception):
    """Base of every error that the user can repair."""


class FormatError(DataFormatError, ValueError):
    """The format is unknown, or the first record does not tell which one it is."""


class ParseError(DataFormatError, ValueError):
    """The file is not valid JSON, is cut short, or is not an array or JSON lines.

    ``record`` is the number of the record (from 1) in which reading stopped, ``offset`` the byte where known.
    """

    def __init__(self, message: str, *, record: int | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.record = record
        self.offset = offset


class RecordError(DataFormatError, ValueError):
    """One record breaks the rules of its format.

    ``code`` is the reason as one word; ``record`` and ``line`` (from 1) say where, once known. ``offset`` is a byte:
    within the record at first, of the file once ``record`` is known.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "record",
        record: int | None = None,
        line: int | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.record = record
        self.line = line
        self.offset = offset


class BadSamplesError(DataFormatError, ValueError):
    """A conversion was refused because samples have problems: ``report`` holds them, ``reason`` may say more."""

    def __init__(self, report: Report, reason: str = "") -> None:
        super().__init__(report, reason)
        self.report = report
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}; {self.report.describe()}" if self.reason else self.report.describe()


class ResumeError(DataFormatError, ValueError):
    """An interrupted conversion cannot go on: nothing to go on from, or its source or options have changed."""


class MissingPackageError(DataFormatError, ImportError):
    """An optional package is needed to read this kind of file; the message says how to install it."""


class OptionError(DataFormatError, ValueError):
    """An argument is out of its range."""


class FolderError(DataFormatError, NotADirectoryError):
    """A folder that was named does not exist or is not a folder."""


class TargetError(DataFormatError, FileExistsError):
    """The output file exists already, or cannot be replaced."""


_BRIEF = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxdict = 12
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


def shown(value: object, limit: int = 80) -> str:
    """Return ``repr(value)``, shortened, so that hostile data cannot flood or steer a terminal."""
    text = repr(value[: limit + 1]) if isinstance(value, str) else _BRIEF.repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
