"""The tokenizer of wan-mini: one token a word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_SPECIAL = ("<pad>", "</s>", "<unk>")


def make_tokenizer(texts: Iterable[str], *, max_length: int = 64) -> Any:  # a transformers tokenizer
    """Return a tokenizer that knows the words of `texts`; others become ``<unk>``. A text ends with ``</s>``.

    Ids of ``<pad>`` and ``</s>`` are 0 and 1, as in UMT5.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    splitter, words = pre_tokenizers.Whitespace(), set[str]()
    for text in texts:
        words |= {word for word, _ in splitter.pre_tokenize_str(text.lower())}
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="right",
    )
