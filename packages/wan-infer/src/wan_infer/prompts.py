"""What a request says in words: what is wanted and what is to be avoided, as text or as embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_infer.config import TransformerConfig
from wan_infer.errors import CheckpointError, RequestError
from wan_infer.lazy import Lazy
from wan_infer.text import PromptEncoder

Words = list[str] | Tensor
Embedded = tuple[Tensor, Tensor]  # [B, L, text_dim], and how many of the L rows are text, [B]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """The two sides of the guidance.

    Attributes:
        wanted: a text each, or embeddings [B, L, text_dim].
        avoided: likewise, one for all or as many; None without guidance.
    """

    wanted: Words
    avoided: Words | None

    def __len__(self) -> int:
        return len(self.wanted)


def read_prompts(
    config: TransformerConfig,
    *,
    prompt: str | Sequence[str] | None,
    prompt_embeds: Tensor | None,
    negative_prompt: str | None,
    negative_prompt_embeds: Tensor | None,
    guided: bool,
) -> Prompts:
    """Put together what was given.

    Raises:
        RequestError: nothing or too much was given, or embeddings do not fit the model.
    """
    if prompt is not None and prompt_embeds is not None:
        raise RequestError("both prompt and prompt_embeds were given; give one of them")
    if prompt is None and prompt_embeds is None:
        raise RequestError("neither prompt nor prompt_embeds was given; say what to show with one of them")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise RequestError("both negative_prompt and negative_prompt_embeds were given; give one of them")
    wanted = _words(config, "prompt", prompt, prompt_embeds)
    avoided = _words(config, "negative_prompt", negative_prompt, negative_prompt_embeds)
    if len(avoided) not in (1, len(wanted)):
        raise RequestError(
            f"there are {len(avoided)} negative prompts for {len(wanted)} prompts; give one for all, or as many"
        )
    return Prompts(wanted=wanted, avoided=avoided if guided else None)


def _words(config: TransformerConfig, name: str, text: str | Sequence[str] | None, embeds: Tensor | None) -> Words:
    if embeds is None:
        words = [text] if isinstance(text, str) else list(text or ())
        if not words or not all(isinstance(word, str) for word in words):
            raise RequestError(f"{name} is {text!r}; a text is expected, or a list with one text at least")
        return words
    fits = embeds.ndim == 3 and embeds.numel() and embeds.is_floating_point()
    if not fits or embeds.shape[1] > config.text_len or embeds.shape[2] != config.text_dim:
        raise RequestError(
            f"{name}_embeds is {embeds.dtype} {list(embeds.shape)}; a floating tensor "
            f"[prompts, 1 to {config.text_len}, {config.text_dim}] is expected"
        )
    return embeds


def embed_prompts(prompts: Prompts, encoder: Lazy[PromptEncoder]) -> list[Embedded]:
    """Return the embeddings of what is wanted and, with guidance, of what is to be avoided, as many of them.

    Raises:
        CheckpointError: the text encoder or its tokenizer is needed, and is missing or damaged.
    """
    embedded = [_embed(prompts.wanted, encoder)]
    if prompts.avoided is not None:
        try:
            embedded.append(_embed(prompts.avoided, encoder))
        except (CheckpointError, RequestError) as error:
            if isinstance(prompts.wanted, Tensor):
                remedy = "give negative_prompt_embeds as well, or guidance=1"
                raise type(error)(f"the negative prompt needs a text encoder: {error}; {remedy}") from error
            raise
    return [(_repeat(rows, len(prompts)), _repeat(lengths, len(prompts))) for rows, lengths in embedded]


def _embed(words: Words, encoder: Lazy[PromptEncoder]) -> Embedded:
    if isinstance(words, Tensor):
        return words, torch.full((len(words),), words.shape[1])
    return encoder.get().encode_prompts(words)


def _repeat(rows: Tensor, count: int) -> Tensor:
    return rows.expand(count, *rows.shape[1:])
