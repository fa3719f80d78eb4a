"""Prompts to embeddings: cleaning, tokens, the UMT5 encoder, and a cache of embeddings on disk."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wan_infer.errors import CheckpointError
from wan_infer.text_cache import EmbeddingCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

TEXT_LEN = 512


def clean_prompt(prompt: str) -> str:
    """Repair broken Unicode, undo HTML escapes (twice, as captions from the web need it) and collapse white space."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt))).strip())


class TextEncoder(nn.Module):
    """A UMT5 encoder.

    Args:
        model: of transformers.
    """

    def __init__(self, model: UMT5EncoderModel) -> None:
        super().__init__()
        self.model = model

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return int(self.model.config.d_model)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings [B, L, dim]; rows of padding are zero.

        Args:
            ids: token ids [B, L].
            mask: [B, L], 1 for a token and 0 for padding, which is never attended.
        """
        device = self.model.shared.weight.device
        ids, mask = ids.to(device), mask.to(device)
        states: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states * mask[..., None].to(states.dtype)


class Tokenizer:
    """Text, cleaned already (`clean_prompt`), to token ids that end with ``</s>``.

    Args:
        tokenizer: of transformers.
        text_len: most tokens of a prompt, the last one included; what is longer is cut off.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_len: int = TEXT_LEN) -> None:
        self.tokenizer = tokenizer
        self.text_len = text_len

    def __call__(self, texts: Sequence[str], *, padded: bool = True) -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 [B, L]: L is `text_len` when padded, else the longest text's length."""
        found = self.tokenizer(
            list(texts),
            padding="max_length" if padded else "longest",
            max_length=self.text_len,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return found["input_ids"], found["attention_mask"]


def load_tokenizer(folder: str | Path, *, text_len: int = TEXT_LEN) -> Tokenizer:
    """Read a tokenizer folder; nothing is ever downloaded, and no code of the folder is run.

    Raises:
        CheckpointError: transformers can't make a tokenizer of it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{folder} holds no tokenizer that transformers reads: {error}") from error
    return Tokenizer(tokenizer, text_len)


class PromptEncoder:
    """Encodes prompts one by one, so that what a prompt gives does not depend on those beside it.

    Args:
        tokenizer: or a function that returns it, called when the first prompt is not in the cache.
        encoder: likewise.
        cache: where embeddings are kept, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | Callable[[], Tokenizer],
        encoder: TextEncoder | Callable[[], TextEncoder],
        *,
        cache: EmbeddingCache | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self.cache = cache

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings [B, L, dim], zero after the end of a prompt, and lengths, int64 [B].

        L is the length of the longest prompt; the transformer completes it to `text_len` itself. What comes from the
        cache is on the CPU, so all of it is.
        """
        rows = [self._encode(clean_prompt(prompt)) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    def _encode(self, text: str) -> Tensor:
        found = self.cache.get(text) if self.cache else None
        if found is None:
            found = self._compute(text)
            if self.cache:
                self.cache.put(text, found)
        return found

    @torch.no_grad()
    def _compute(self, text: str) -> Tensor:
        if not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = self._tokenizer()
        if not isinstance(self._encoder, TextEncoder):
            self._encoder = self._encoder()
        ids, mask = self._tokenizer([text], padded=False)
        embedding: Tensor = self._encoder(ids, mask)[0].cpu()
        return embedding


def tokenizer_fingerprint(folder: str | Path) -> str:
    """Return a SHA-256 over the names and contents of the files of a tokenizer folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
