"""A pair as one record of two sequences, which share the question and its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mm_datafmt import Sample
from mm_finetune.config import DataConfig
from mm_finetune.data.encoder import Encoder, Media
from mm_finetune.data.faults import require_read
from mm_finetune.data.truncation import Shortened, shorten
from mm_finetune.errors import DataError
from mm_finetune.preference.pairs import read_pairs
from mm_finetune.template import IMAGE, VIDEO, Encoded, LabelRules, Segment, labelled, segments, turns


class PairEncoder(Encoder):
    """Encodes pairs: the question with the chosen answer, then the question with the rejected one.

    The answers alone carry loss, earlier ones don't. Both sequences fit into ``data.seq_length``, or the pair is out.
    """

    def __init__(self, config: DataConfig, hf_dir: Path) -> None:
        super().__init__(config, hf_dir)
        self.rules = LabelRules(mask_history=True)

    def records(self) -> Iterator[Sample]:
        """The pairs of the data set."""
        return read_pairs(self.config.path)

    def fingerprint(self) -> str:
        """Another one than of the same settings for single answers."""
        return f"pairs {super().fingerprint()}"

    def segments(self, sample: Sample) -> list[Segment]:
        """The question's texts, the chosen answer, the rejected one."""
        require_read(sample)
        *_, chosen, rejected = sample.messages
        for answer in (chosen, rejected):
            if IMAGE in answer.content or VIDEO in answer.content:
                raise DataError("a picture stands in an answer of a pair; pictures belong to the question")
        before, images, videos = sample.messages[:-2], len(sample.images), len(sample.videos)
        first, second = (segments((*before, answer), images=images, videos=videos) for answer in (chosen, rejected))
        return [*first, second[-1]]

    def conversation(
        self, pieces: Sequence[Segment], ids: Sequence[Sequence[int]], media: Media
    ) -> tuple[Shortened, Encoded]:
        """Both conversations, or none where one does not fit."""
        counts = self._tokens(media.images), self._tokens(media.videos)
        shortened = []
        for answer in (-2, -1):
            made = turns([*pieces[:-2], pieces[answer]], [*ids[:-2], ids[answer]], self.tokenizer, *counts)
            shortened.append(shorten(made, self.config.seq_length, self.config.truncate))
        longest = max(shortened, key=lambda short: short.length)
        chosen, rejected = (labelled(short.turns, self.rules) for short in shortened)
        both = Encoded(
            input_ids=chosen.input_ids + rejected.input_ids,
            labels=chosen.labels + rejected.labels,
            weights=chosen.weights + rejected.weights,
            lengths=(len(chosen.input_ids), len(rejected.input_ids)),
        )
        return longest, both
