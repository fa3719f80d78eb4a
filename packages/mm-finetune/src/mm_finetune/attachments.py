"""Pictures and videos that other commands made, to be shown on a page, inside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mm_finetune.errors import DataError

MAX_BYTES = 20_000_000  # of one file; a page with more is no pleasure to open

# How a file begins, by its suffix, and what it becomes.
_KINDS = {
    ".png": (b"\x89PNG\r\n\x1a\n", 0, '<img alt="{name}" src="data:image/png;base64,{data}">'),
    ".mp4": (b"ftyp", 4, '<video controls loop muted autoplay src="data:video/mp4;base64,{data}"></video>'),
}


def attachments(files: Sequence[Path]) -> str:
    """Return a section that shows the files side by side; nothing without files.

    Raises:
        DataError: one is missing, too large, or neither a PNG picture nor an MP4 video.
    """
    if not files:
        return ""
    figures = "".join(f'<figure class="panel">{_caption(file)}{_shown(file)}</figure>' for file in files)
    return f'<h2>More results</h2><section class="columns attached">{figures}</section>'


def _caption(file: Path) -> str:
    return f"<figcaption>{escape(file.name)}</figcaption>"


def _shown(file: Path) -> str:
    if file.suffix not in _KINDS:
        raise DataError(f"--attach {file}: only .png pictures and .mp4 videos can be shown")
    if not file.is_file():
        raise DataError(f"--attach {file}: there is no such file")
    if file.stat().st_size > MAX_BYTES:
        raise DataError(f"--attach {file}: it has more than {MAX_BYTES / 1e6:.0f} MB; attach a shorter or smaller one")
    content = file.read_bytes()
    beginning, offset, markup = _KINDS[file.suffix]
    if not content.startswith(beginning, offset):
        raise DataError(f"--attach {file}: this is no {file.suffix[1:].upper()} file, whatever its name says")
    return markup.format(name=escape(file.stem), data=base64.b64encode(content).decode("ascii"))
