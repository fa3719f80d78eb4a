"""Reads a failed log and says what is the cause, what only follows from it, and what it does not know.

>>> from ascend_envcheck import explain
>>> explain("ImportError: libatb.so: cannot open shared object file").cause.failure.id
'LIB-ATB'
"""

from __future__ import annotations

from typing import Callable, Iterable, Iterator

from ascend_envcheck.explanation.reading import Reading
from ascend_envcheck.explanation.result import Explanation, Found, Place
from ascend_envcheck.explanation.scan import Scan
from ascend_envcheck.explanation.sources import Source, blocks

__all__ = ["Explanation", "Found", "Place", "explain", "explain_files"]

_UNKNOWN = 8  # unexplained lines that are kept: as many as one looks at


def explain(source: Source, *, unknown: int = _UNKNOWN) -> Explanation:
    """What a log says, in one pass; memory does not grow with its length.

    Args:
        source: the text of a log, its lines, or a file open for reading (binary where its encoding is not known).
        unknown: how many lines that look like errors, and that no failure of the table explains, are kept; 1 or more.

    Raises:
        OSError: the file can't be read.
        UnicodeDecodeError: a file that was opened as text is not in its encoding.
    """
    return explain_files([("", source)], unknown=unknown)


def explain_files(
    sources: Iterable[tuple[str, Source]],
    *,
    unknown: int = _UNKNOWN,
    progress: Callable[[str, int], None] | None = None,
) -> Explanation:
    """`explain` for the logs of one run, of several processes for instance, each with its name.

    Args:
        sources: names and what `explain` takes.
        unknown: as in `explain`.
        progress: is called with the name and the bytes read of it so far, once a megabyte.

    Raises:
        OSError: a file can't be read.
        UnicodeDecodeError: a file that was opened as text is not in its encoding.
    """
    reading = Reading(unknown)
    for name, source in sources:
        reading.open(name)
        scan = Scan(_told(name, blocks(source), progress))
        for suspect in scan:
            reading.see(suspect)
        reading.close(scan.lines)
    return reading.result()


def _told(name: str, read: Iterable[bytes], progress: Callable[[str, int], None] | None) -> Iterator[bytes]:
    size = 0
    for block in read:
        yield block
        size += len(block)
        if progress is not None:
            progress(name, size)
