"""The records of a run by number, and what is known of each before the first step."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mm_datafmt import DataFormatError, Sample
from mm_finetune.config import DataConfig
from mm_finetune.data.batches import EncodedSample
from mm_finetune.data.encoder import Encoder
from mm_finetune.data.faults import BadRecords, Fault
from mm_finetune.data.lengths import Index, build_index
from mm_finetune.data.packing import CostModel
from mm_finetune.errors import DataError

MIB = 1 << 20
TOKEN_BYTES = 8 * 5  # ids, label and three positions, each int64


class Dataset:
    """Encoded records by number.

    Args:
        config: path, limits, rules, policies.
        hf_dir: the model folder: tokenizer and image processor.
        kind: what reads and encodes a record.

    Raises:
        DataError: no record, or not a data set.
        ConfigError: no model in `hf_dir`.
    """

    def __init__(self, config: DataConfig, hf_dir: Path, *, kind: type[Encoder] = Encoder) -> None:
        self.config = config
        self.encoder = kind(config, hf_dir)
        try:
            self.samples: list[Sample] = list(islice(self.encoder.records(), config.max_samples))
        except DataFormatError as error:
            raise DataError(f"{error}; make the file with mm-datafmt convert") from error
        if not self.samples:
            raise DataError(f"{config.path} holds no records")
        self.cost = CostModel.of(self.encoder.hf_config)
        self._index: Index | None = None
        self._faults: dict[int, Fault] = {}
        self._cache = _Cache(config.cache_mib * MIB)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> EncodedSample:
        """A record with its pixels.

        Raises:
            DataError: it can't be used.
        """
        return self.encode(number, pixels=True)

    @property
    def index(self) -> Index:
        """What is known of every record; made at the first look, from headers alone."""
        return self._index or self.look()

    def look(self, *, progress: bool = False) -> Index:
        """Make the index now.

        Args:
            progress: show a bar on a terminal.
        """
        index = build_index(self.encoder, self.samples, progress=progress)
        self.adopt(index)
        return index

    def adopt(self, index: Index) -> None:
        """Take another process's index in the place of one's own: what it says of a file then holds here too."""
        self._faults = {fault.record: fault for fault in index.faults}
        self._index = index

    def check(self, *, progress: bool = False, report: Path | None = None) -> BadRecords:
        """Look at every record before the first step, without decoding a picture.

        Args:
            progress: show a bar on a terminal.
            report: file that bad records are written to.

        Returns:
            The bad records, to which a :class:`Loader` adds.

        Raises:
            DataError: names the records that can't be used, unless ``data.on_bad`` bears them, or none can be used.
        """
        index = self._index or self.look(progress=progress)
        bad = BadRecords(self.config.on_bad, self.config.max_bad_ratio, len(self), report)
        bad.add(index.faults)
        if not len(index.usable):
            raise DataError(f"no record of {self.config.path} can be used: {index.described()}")
        return bad

    def encode(self, number: int, *, pixels: bool) -> EncodedSample:
        """A record, with or without pixels. Safe to call from several threads.

        Raises:
            DataError: it can't be used.
        """
        index = self.index
        fault = self._faults.get(number)
        if fault is not None:
            raise DataError(f"record {number} of {self.config.path}: {fault.message}")
        cached = self._cache.get((number, pixels))
        if cached is None:
            cached = self.encoder.encode(self.samples[number], index.media(number), number, pixels=pixels)
            self._cache.put((number, pixels), cached, self.size(number, pixels=pixels))
        return cached

    def blank(self, number: int) -> EncodedSample:
        """A record of the same shape, with zeros for pixels and no loss: stands in for one that can't be read."""
        sample = self.encode(number, pixels=False).silenced()
        images, videos = sample.images, sample.videos
        if images is not None:
            images = replace(images, pixel_values=self._zeros(images.image_grid_thw))
        if videos is not None:
            videos = replace(videos, pixel_values_videos=self._zeros(videos.video_grid_thw))
        return replace(sample, images=images, videos=videos)

    def size(self, number: int, *, pixels: bool) -> int:
        """Bytes of an encoded record."""
        patches = int(self.index.patches[number]) if pixels else 0
        return int(self.index.tokens[number]) * TOKEN_BYTES + patches * self.encoder.patch_width * 4

    def costs(self, numbers: Sequence[int]) -> list[float]:
        """Floating point operations of records, estimated."""
        index = self.index
        return [self.cost(int(index.tokens[n]), int(index.patches[n]), int(index.largest[n])) for n in numbers]

    def _zeros(self, grids: Tensor) -> Tensor:
        return torch.zeros(int(grids.prod(dim=1).sum()), self.encoder.patch_width)


class _Cache:
    """The records used last, as many as fit."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._items: OrderedDict[tuple[int, bool], tuple[EncodedSample, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, bool]) -> EncodedSample | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: tuple[int, bool], sample: EncodedSample, size: int) -> None:
        with self._lock:
            if key in self._items or size > self._limit:
                return
            self._items[key] = sample, size
            self._held += size
            while self._held > self._limit:
                self._held -= self._items.popitem(last=False)[1][1]
