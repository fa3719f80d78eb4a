"""The tokenizer of a model folder, with the places of its tokens in the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checking.text_tokens import TokenizerFile


class PreviewTokenizer(TokenizerFile):
    """``tokenizer.json`` of ``folder``, without any truncation or padding that it prescribes.

    Raises :class:`FolderError`, :class:`ParseError`, and :class:`MissingPackageError` without the extra ``tokenizer``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, text: str) -> tuple[list[int], list[int]]:
        """Return the token ids of ``text``, and the index of the character behind each token."""
        encoding: Any = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]
