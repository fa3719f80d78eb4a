"""A folder of torch.distributed.checkpoint to write, laid out before there is any data.

Its files hold one record a tensor, which torch.load reads (see :mod:`mm_convert.torch_layout`). The description beside
them is in :mod:`mm_convert.distributed.description`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from mm_convert import pickling
from mm_convert.plans import Ref, Spec
from mm_convert.rules import Shape
from mm_convert.torch_layout import VERSION, Record, TorchLayout, central_directory, placed

STEM = "archive"


@dataclass(frozen=True)
class Stored:
    """A piece to write.

    Attributes:
        key: the tensor that it belongs to.
        whole: that tensor's shape.
        offsets: where the piece begins in it.
        spec: what is stored.
    """

    key: str
    whole: Shape
    offsets: Shape
    spec: Spec

    @classmethod
    def alone(cls, key: str, spec: Spec) -> Stored:
        """A tensor in one piece."""
        return cls(key, spec.shape, (0,) * len(spec.shape), spec)


@dataclass(frozen=True, kw_only=True)
class DistcpLayout:
    """One ``.distcp`` file.

    Attributes:
        size: its bytes.
        offsets: where each tensor's first byte goes.
        records: first byte and content of each record.
        extents: first byte and length of each tensor's record.
        value: first byte and length of the record of what is no tensor, if there is one.
    """

    size: int
    offsets: Mapping[Ref, int]
    records: tuple[tuple[int, TorchLayout], ...]
    extents: Mapping[Ref, tuple[int, int]]
    value: tuple[int, int] | None

    @classmethod
    def of(cls, tensors: Mapping[Ref, Spec], value: bytes | None = None) -> DistcpLayout:
        """Lay out a file.

        Args:
            tensors: what goes in, in order.
            value: what goes in as well and is no tensor, pickled.
        """
        layouts = [_record(pickling.tensor("0", spec), ref, spec) for ref, spec in tensors.items()]
        layouts += [] if value is None else [_record(value)]
        starts = [0, *accumulate(layout.size for layout in layouts)]
        records = tuple(zip(starts, layouts, strict=False))
        return cls(
            size=starts[-1],
            offsets={ref: start + at for start, layout in records for ref, at in layout.offsets.items()},
            records=records,
            extents={ref: (start, layout.size) for start, layout in records for ref in layout.offsets},
            value=None if value is None else (records[-1][0], records[-1][1].size),
        )

    def frame(self, crcs: Mapping[Ref, int]) -> Iterator[tuple[int, bytes]]:
        """What is no tensor: (offset, bytes)."""
        for start, layout in self.records:
            for offset, data in layout.frame(crcs):
                yield start + offset, data


def _record(value: bytes, ref: Ref | None = None, spec: Spec | None = None) -> TorchLayout:
    """What torch.save would write of one value."""
    pickled = b"\x80\x02" + value + b"."
    contents: list[tuple[str, int, bytes | None]] = [("data.pkl", len(pickled), pickled), ("byteorder", 6, b"little")]
    if spec is not None:
        contents.append(("data/0", spec.nbytes, None))
    contents.append(("version", len(VERSION), VERSION))
    records: list[Record] = []
    for name, size, data in contents:
        records.append(placed(records[-1].end if records else 0, f"{STEM}/{name}".encode(), size, data))
    end = records[-1].end
    refs = {} if ref is None else {f"{STEM}/data/0".encode(): ref}
    offsets = {refs[record.name]: record.start for record in records if record.name in refs}
    size = end + len(central_directory(records, [0] * len(records), end))
    return TorchLayout(size=size, offsets=offsets, records=tuple(records), refs=refs)


def as_bytes(layout: TorchLayout) -> bytes:
    """A file without tensors."""
    made = bytearray(layout.size)
    for offset, data in layout.frame({}):
        made[offset : offset + len(data)] = data
    return bytes(made)
