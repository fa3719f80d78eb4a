"""Embeddings of prompts on disk, so that a text encoder of 11 GB is loaded once and not for every video."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_KEY = "embedding"


class EmbeddingCache:
    """A folder with one safetensors file a prompt.

    The name of a file is the SHA-256 of `encoder` and the text, so files of several encoders may share a folder. Files
    appear whole; a damaged one counts as absent and is written again. Several processes may use the same folder.

    Args:
        folder: made when the first embedding is kept.
        encoder: everything but the text that decides about the values: weights, tokenizer, dtype.
    """

    def __init__(self, folder: str | Path, encoder: str) -> None:
        self.folder = Path(folder)
        self.encoder = encoder

    def path(self, text: str) -> Path:
        """Return the file of a cleaned prompt."""
        key = hashlib.sha256(f"{self.encoder}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / f"{key}.safetensors"

    def get(self, text: str) -> Tensor | None:
        """Return the embedding [L, dim], or None when there is none that can be read."""
        try:
            found = load_file(self.path(text)).get(_KEY)
        except (SafetensorError, OSError):
            return None
        usable = found is not None and found.ndim == 2 and bool(torch.isfinite(found).all())
        return found if usable else None

    def put(self, text: str, embedding: Tensor) -> None:
        """Keep an embedding [L, dim].

        Raises:
            OSError: the folder can't be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=self.folder) as scratch:
            file = Path(scratch) / "new.safetensors"
            save_file({_KEY: embedding.contiguous()}, file)
            file.replace(self.path(text))
