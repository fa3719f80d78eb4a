"""Records of a parquet file, by batches. Needs pyarrow (``pip install mm-datafmt[parquet]``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .errors import MissingPackageError, ParseError
from .splitting import Cursor, Run

_ROWS = 256


def parquet_runs(path: Path, start: Cursor) -> Iterator[Run]:
    """Yield the rows from ``start`` on; line and byte of a row are its number. Null columns are left out."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError(f"{path} is a parquet file: pip install 'mm-datafmt[parquet]'") from None
    number = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                rows = batch.to_pylist() if number + batch.num_rows > start.number else [None] * batch.num_rows
                kept = [_fields(row) for row in rows[max(0, start.number - number) :] if row is not None]
                begin = max(number, start.number)
                number += batch.num_rows
                if kept:
                    yield Run(Cursor(begin, begin, begin), kept, b"", "rows", Cursor(number, number, number))
    except (pyarrow.ArrowException, OSError) as error:
        raise ParseError(f"{path}: not a parquet file that can be read: {error}") from error


def _fields(row: dict[str, object]) -> object:
    return {name: value for name, value in row.items() if value is not None}
