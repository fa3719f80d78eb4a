"""Answers as they come, one line of JSON each, so that an interrupted evaluation can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mm_finetune.errors import OutputExistsError
from mm_finetune.evaluation.answers import Answer, Failure

Row = Answer | Failure


class Journal:
    """The file ``OUTPUT.answers.jsonl``. Its first line says what is evaluated; it goes when the result is written.

    Args:
        output: the file of the result.
        purpose: what is evaluated, and how; plain values.
    """

    def __init__(self, output: Path, purpose: dict[str, Any]) -> None:
        self.path = output.with_name(f"{output.name}.answers.jsonl")
        self.purpose = purpose

    def begin(self, *, resume: bool, overwrite: bool) -> dict[int, Row]:
        """Look at what an interrupted run left.

        Args:
            resume: go on with it.
            overwrite: begin anew.

        Returns:
            What is answered already, by number of the record.

        Raises:
            OutputExistsError: there is something, and it is to be neither kept nor replaced, or it is of another
                evaluation.
        """
        if not self.path.exists():
            return {}
        if not resume:
            if not overwrite:
                raise OutputExistsError(
                    f"{self.path} holds the answers of an interrupted run; add --resume to go on, or --overwrite to"
                    " begin anew"
                )
            self.path.unlink()
            return {}
        rows = _lines(self.path)
        if not rows:  # nothing was written but half a line
            self.path.unlink()
            return {}
        if rows[0] != self.purpose:
            odd = sorted(
                key for key in self.purpose.keys() | rows[0].keys() if self.purpose.get(key) != rows[0].get(key)
            )
            raise OutputExistsError(
                f"{self.path} is of another evaluation ({', '.join(odd)}); add --overwrite to begin anew"
            )
        # A line that was cut off must not run into the next one.
        self.path.write_bytes(b"".join(_line(row) for row in rows))
        return dict(map(_parsed, rows[1:]))

    def add(self, rows: Iterable[tuple[int, Row]]) -> None:
        """Write down more of them, all in one write."""
        text = b"".join(_line(_plain(number, row)) for number, row in rows)
        if text:
            head = b"" if self.path.exists() else _line(self.purpose)
            with self.path.open("ab", buffering=0) as file:
                file.write(head + text)

    def rows(self) -> dict[int, Row]:
        """All of them, in the order of the records."""
        return dict(sorted(map(_parsed, _lines(self.path)[1:]))) if self.path.exists() else {}

    def remove(self) -> None:
        """The result is written."""
        self.path.unlink(missing_ok=True)


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _plain(number: int, row: Row) -> dict[str, Any]:
    return {"number": number, **({"reason": row.reason} if isinstance(row, Failure) else row.as_dict())}


def _parsed(row: dict[str, Any]) -> tuple[int, Row]:
    number = int(row["number"])
    return number, Failure(number=number, reason=row["reason"]) if "reason" in row else Answer.from_dict(row)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines up to the first one that is not whole."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found
