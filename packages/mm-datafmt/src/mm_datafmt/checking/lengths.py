"""How long samples are in tokens, as Qwen2.5-VL is trained on them: template, text and images.

The template is MindSpeed MM's and LLaMA-Factory's ``qwen2vl``: a system turn (``You are a helpful assistant.`` if the
sample has none), each turn between ``<|im_start|>role`` and ``<|im_end|>``, each image as ``<|vision_start|>``, its
``<|image_pad|>`` tokens and ``<|vision_end|>``. Questions and answers are tokenised separately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ..sample import IMAGE_PLACEHOLDER, Sample
from ..tokens import image_token_count
from .text_tokens import TextCounter

DEFAULT_SYSTEM = "You are a helpful assistant."
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_TURNS = {
    "assistant": "{}<|im_end|>\n",
    "user": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "observation": "<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n",
}

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class PixelRule:
    """How the trainer sizes images; the defaults are MindSpeed MM's examples for Qwen2.5-VL.

    ``image_max_pixels`` and ``image_min_pixels`` are those of its ``data.json`` (None and 0: no such step),
    ``min_pixels`` and ``max_pixels`` those of the model's image processor. See :func:`image_token_count`.
    """

    image_max_pixels: int | None = 262144
    image_min_pixels: int = 0
    min_pixels: int = 3136
    max_pixels: int = 12845056

    def tokens(self, width: int, height: int) -> int:
        """Return the tokens of an image, or raise ``ValueError`` if it cannot be trained on."""
        return image_token_count(
            width,
            height,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            pixel_cap=self.image_max_pixels,
            pixel_floor=self.image_min_pixels,
        )

    def __post_init__(self) -> None:
        self.tokens(28, 28)  # says what is wrong with the limits


def segments_of(sample: Sample) -> list[str] | None:
    """Return the texts whose tokens, one after another, are those of ``sample``; an image has a single pad token.

    None for what the template has no published form of here: videos, audio, tools and calls.
    """
    if sample.videos or sample.audios or sample.tools is not None:
        return None
    messages = sample.messages
    first = messages[0].content if messages[:1] and messages[0].role == "system" else None
    segments = []
    text = f"<|im_start|>system\n{first or DEFAULT_SYSTEM}<|im_end|>\n"
    for role, content, _, _ in messages if first is None else messages[1:]:
        if role not in _TURNS:
            return None
        text += _TURNS[role].replace("{}", content.replace(IMAGE_PLACEHOLDER, _IMAGE))
        if role != "assistant":
            segments.append(text)
            text = ""
    return [*segments, text]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of the samples that are fit for use.

    ``counts`` says how many samples have each length; ``unmeasured`` have none (video, audio, tools, or an image that
    was not looked at). ``exact`` is whether a tokenizer counted the text; images always are exact. ``image_tokens`` is
    their sum over all samples. ``seq_length`` is the limit that was asked about.
    """

    counts: dict[int, int]
    unmeasured: int
    exact: bool
    image_tokens: int
    seq_length: int | None = None

    @property
    def measured(self) -> int:
        """How many samples have a length."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Tokens of all samples."""
        return sum(length * count for length, count in self.counts.items())

    @property
    def truncated(self) -> int:
        """How many samples ``seq_length`` would cut; 0 without it."""
        limit = self.seq_length
        return 0 if limit is None else sum(count for length, count in self.counts.items() if length > limit)

    def quantile(self, share: float) -> int:
        """Return the smallest length that at least ``share`` of the samples do not exceed."""
        needed, seen = share * self.measured, 0
        for length in sorted(self.counts):
            seen += self.counts[length]
            if seen >= needed:
                return length
        return 0

    def summary(self) -> dict[str, int | float | bool | None]:
        """Return the figures as plain JSON types."""
        measured = self.measured
        return {
            "measured": measured,
            "unmeasured": self.unmeasured,
            "text_exact": self.exact,
            "total": self.total,
            "image_tokens": self.image_tokens,
            "min": min(self.counts, default=0),
            "median": self.quantile(0.5),
            "mean": round(self.total / measured, 1) if measured else 0.0,
            "p90": self.quantile(0.9),
            "p99": self.quantile(0.99),
            "max": max(self.counts, default=0),
            "seq_length": self.seq_length,
            "truncated": self.truncated,
            "truncated_share": round(self.truncated / measured, 6) if measured else 0.0,
        }

    def describe(self) -> Iterator[str]:
        """Yield the figures as lines of text."""
        if self.measured:
            how = "text by the tokenizer" if self.exact else "text ESTIMATED from characters, exact with --tokenizer"
            s = self.summary()
            yield (
                f"tokens a sample ({how}; images exact): min {s['min']}, median {s['median']}, mean {s['mean']}, "
                f"90% {s['p90']}, 99% {s['p99']}, max {s['max']}; {self.total} in all, {self.image_tokens} of images"
            )
            if self.seq_length is not None:
                share = 100 * self.truncated / self.measured
                yield (
                    f"seq_length {self.seq_length} would truncate {self.truncated} of {self.measured} samples "
                    f"({share:.2f} %)"
                )
        if self.unmeasured:
            yield f"{self.unmeasured} samples have no token count: video, audio, tools, or images not looked at"


@dataclass(kw_only=True)
class LengthMeter:
    """Adds up the lengths of samples, a run at a time."""

    rule: PixelRule
    text: TextCounter
    counts: Counter[int] = field(default_factory=Counter)
    image_tokens: int = 0
    unmeasured: int = 0

    def __post_init__(self) -> None:
        self._tokens = lru_cache(maxsize=1 << 14)(self.rule.tokens)

    def refusal(self, width: int, height: int) -> str | None:
        """Return why an image of this size cannot be trained on, None if it can."""
        try:
            self._tokens(width, height)
        except ValueError as error:
            return str(error)
        return None

    def add(self, samples: Sequence[tuple[Sample, Sequence[Size]]]) -> list[int | None]:
        """Take note of samples and the sizes of their images; return their lengths, None where there is none."""
        texts = [segments_of(sample) if all(width for width, _ in sizes) else None for sample, sizes in samples]
        counted = iter(self.text.counts([text for text in texts if text is not None]))
        lengths: list[int | None] = []
        for text, (_, sizes) in zip(texts, samples, strict=True):
            if text is None:
                lengths.append(None)
                continue
            pads = sum([self._tokens(*size) for size in sizes])
            lengths.append(length := next(counted) + pads - len(sizes))
            self.image_tokens += pads
            self.counts[length] += 1
        self.unmeasured += lengths.count(None)
        return lengths

    def lengths(self, seq_length: int | None) -> Lengths:
        """Return what was measured."""
        return Lengths(
            counts=dict(sorted(self.counts.items())),
            unmeasured=self.unmeasured,
            exact=self.text.exact,
            image_tokens=self.image_tokens,
            seq_length=seq_length,
        )
