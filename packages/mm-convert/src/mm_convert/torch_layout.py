"""A ``.pt`` file to write, laid out byte for byte before there is any data, as torch.save would write it.

A zip file (PKWARE's APPNOTE) of stored records: ``<stem>/data.pkl``, ``byteorder``, ``data/0``, ``data/1``, … and
``version``. Each record's data begins at a multiple of 64 (an extra field "FB" pads), so that torch can map it, and is
followed by a descriptor with its CRC-32: nothing in front of the data depends on the data. Zip64 fields stand where a
size or an offset needs more than 32 bits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from zlib_ng.zlib_ng import crc32

from mm_convert import pickling
from mm_convert.plans import Ref, Spec

ALIGNMENT = 64
LIMIT = 0xFFFFFFFF  # a 32-bit field with this value says: see the zip64 field
FLAGS = 0x0808  # names are UTF-8; CRC and sizes stand behind the data
VERSION = b"3\n"  # of torch's format


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of the zip: its place, and its bytes if they are known beforehand."""

    name: bytes
    header: int
    start: int
    size: int
    data: bytes | None = None

    @property
    def wide(self) -> bool:
        """Whether it needs zip64 fields."""
        return self.size >= LIMIT or self.header >= LIMIT

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.start + self.size + (24 if self.wide else 16)

    def local_header(self) -> bytes:
        """What stands before the data."""
        extra = self._zip64()
        padding = self.start - self.header - 30 - len(self.name) - len(extra) - 4
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fields = (b"PK\3\4", 0, FLAGS, 0, 0, 0, 0, 0, 0, len(self.name), len(extra))
        return struct.pack("<4s5H3I2H", *fields) + self.name + extra

    def descriptor(self, crc: int) -> bytes:
        """What stands behind the data."""
        return struct.pack("<4sI2Q" if self.wide else "<4s3I", b"PK\7\10", crc, self.size, self.size)

    def entry(self, crc: int) -> bytes:
        """The record's entry in the central directory."""
        size, header = min(self.size, LIMIT), min(self.header, LIMIT)
        extra = self._zip64()
        fields = (b"PK\1\2", 0, 0, FLAGS, 0, 0, 0, crc, size, size, len(self.name), len(extra), 0, 0, 0, 0, header)
        return struct.pack("<4s6H3I5H2I", *fields) + self.name + extra

    def _zip64(self) -> bytes:
        numbers = [self.size] * 2 if self.size >= LIMIT else []
        numbers += [self.header] if self.header >= LIMIT else []
        return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


@dataclass(frozen=True, kw_only=True)
class TorchLayout:
    """The whole file.

    Attributes:
        size: its bytes.
        offsets: where each tensor's first byte goes.
        records: every record, in order.
        refs: the tensor of each record that holds one.
    """

    size: int
    offsets: Mapping[Ref, int]
    records: tuple[Record, ...]
    refs: Mapping[bytes, Ref]

    @classmethod
    def of(
        cls, stem: str, sections: Sequence[str], tensors: Mapping[Ref, Spec], numbers: Mapping[str, float]
    ) -> TorchLayout:
        """Lay out ``{section: {name: tensor}, …, **numbers}``.

        Args:
            stem: the file's name without suffix: torch names the records after it.
            sections: keys of the dict, those without a tensor included.
            tensors: the tensors, in order.
            numbers: further entries.
        """
        pickled = _pickle(sections, tensors, numbers)
        refs = {f"{stem}/data/{key}".encode(): ref for key, ref in enumerate(tensors)}
        contents: list[tuple[bytes, int, bytes | None]] = [
            (f"{stem}/data.pkl".encode(), len(pickled), pickled),
            (f"{stem}/byteorder".encode(), 6, b"little"),
            *((name, tensors[ref].nbytes, None) for name, ref in refs.items()),
            (f"{stem}/version".encode(), len(VERSION), VERSION),
        ]
        records: list[Record] = []
        for name, size, data in contents:
            records.append(placed(records[-1].end if records else 0, name, size, data))
        offsets = {refs[record.name]: record.start for record in records if record.name in refs}
        end = records[-1].end
        size = end + len(central_directory(records, [0] * len(records), end))
        return cls(size=size, offsets=offsets, records=tuple(records), refs=refs)

    def frame(self, crcs: Mapping[Ref, int]) -> Iterator[tuple[int, bytes]]:
        """What is no tensor: (offset, bytes).

        Args:
            crcs: CRC-32 of each tensor's bytes.
        """
        all_crcs = [crc32(r.data) if r.data is not None else crcs[self.refs[r.name]] for r in self.records]
        for record, crc in zip(self.records, all_crcs, strict=True):
            yield record.header, record.local_header() + (record.data or b"")
            yield record.start + record.size, record.descriptor(crc)
        end = self.records[-1].end
        yield end, central_directory(self.records, all_crcs, end)


def placed(header: int, name: bytes, size: int, data: bytes | None) -> Record:
    """A record whose data begins at the next multiple of 64 that leaves room for its header."""
    least = Record(name=name, header=header, start=0, size=size)
    unpadded = header + 30 + len(name) + len(least._zip64()) + 4
    return Record(name=name, header=header, start=-(-unpadded // ALIGNMENT) * ALIGNMENT, size=size, data=data)


def central_directory(records: Sequence[Record], crcs: Sequence[int], start: int) -> bytes:
    """The central directory, which begins at `start`, and the records that end the file."""
    entries = b"".join(record.entry(crc) for record, crc in zip(records, crcs, strict=True))
    count, size, tail = len(records), len(entries), b""
    if count >= 0xFFFF or max(start, size) >= LIMIT:
        tail = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        tail += struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    shown = min(count, 0xFFFF)
    return (
        entries + tail + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, shown, shown, min(size, LIMIT), min(start, LIMIT), 0)
    )


def _pickle(sections: Sequence[str], tensors: Mapping[Ref, Spec], numbers: Mapping[str, float]) -> bytes:
    """The content of ``data.pkl``: each tensor is a call that refers to its storage by number."""
    keys = {ref: str(key) for key, ref in enumerate(tensors)}
    out = [b"\x80\x02}("]
    for section in sections:
        out += [pickling.text(section), b"}("]
        for ref, spec in tensors.items():
            if ref.section == section:
                out += [pickling.text(ref.name), pickling.tensor(keys[ref], spec)]
        out.append(b"u")
    for name, number in numbers.items():
        out += [pickling.text(name), struct.pack(">cd", b"G", number)]
    return b"".join([*out, b"u."])
