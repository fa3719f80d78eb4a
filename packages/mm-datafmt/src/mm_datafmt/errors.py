"""Everything this package raises on purpose.

::

    DataFormatError
    ├── FormatError (ValueError)         the format is unknown, or cannot be told from the first record
    ├── ParseError (ValueError)          the file is not the JSON it should be, or ends too early
    ├── RecordError (ValueError)         one record breaks the rules of its format
    ├── BadSamplesError (ValueError)     a conversion was refused: samples have problems (``.report``)
    ├── FolderError (NotADirectoryError) a folder that was named does not exist
    └── TargetError (FileExistsError)    the output file may not be written

All can be caught as :class:`DataFormatError` or as the built-in type beside them. A new class is a built-in type as
well, survives pickling and is exported by the package.
"""

from __future__ import annotations

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

    ``code`` is the reason as one word; ``record`` (from 1) and ``line`` (JSON lines only) say where, once known.
    """

    def __init__(
        self, message: str, *, code: str = "record", record: int | None = None, line: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.record = record
        self.line = line


class BadSamplesError(DataFormatError, ValueError):
    """A conversion was refused because samples have problems; ``report`` holds them."""

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self.report = report

    def __str__(self) -> str:
        return self.report.describe()


class FolderError(DataFormatError, NotADirectoryError):
    """A folder that was named does not exist or is not a folder."""


class TargetError(DataFormatError, FileExistsError):
    """The output file exists already, or cannot be replaced."""


def shown(value: object, limit: int = 80) -> str:
    """Return ``repr(value)``, shortened, so that hostile data cannot flood or steer a terminal."""
    text = repr(value[: limit + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
