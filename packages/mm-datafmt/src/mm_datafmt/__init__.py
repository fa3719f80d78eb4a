"""Image conversations of any published layout to the training data of MindSpeed MM and back, every record checked.

::

    from mm_datafmt import Source, check, convert, image_token_count, read

    convert("llava.json", "data/train.json", image_dir="data/images")     # all records clean, or no train.json
    convert([Source("a.json", 0.7), Source("b.jsonl.zst", 0.3)], "data/mix.json", shuffle=True, on_bad="skip")
    report = check("data/train.json")                                     # again, any time
    assert report.ok, report.describe()

    for sample in read("data/train.json"):                                # in constant memory
        print(sample.images, sample.messages[-1].content)
    bad = [found for found in read_each("raw.json") if isinstance(found, RecordError)]     # no record stops it

    image_token_count(640, 480, pixel_cap=262144)                         # 336, from the size alone

Files are JSON arrays or JSON lines (also gzip or zstd), parquet or COCO annotations, in one of :data:`FORMATS`; the
first records tell which. orjson, Pillow and tqdm are imported when the first file is opened.

How it is made: :mod:`.splitting` cuts bytes into runs of decoded records, :mod:`.inputs` does so for every kind
of file, :mod:`.sources` orders several of them, :mod:`.judging` makes a value a :class:`Sample` or says why not,
:mod:`.emitting` encodes it (:mod:`.plain` does both in one go where a record is plain), :mod:`.outcomes` shares that
out to :mod:`.workers`, :mod:`.conversion` writes. A new format is one class of two functions in :mod:`.formats`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    BadSamplesError,
    DataFormatError,
    FolderError,
    FormatError,
    MissingPackageError,
    OptionError,
    ParseError,
    RecordError,
    ResumeError,
    TargetError,
)
from .report import Problem, Report
from .sample import Message, Sample
from .tokens import image_token_count, resized_size

if TYPE_CHECKING:
    from .checking.lengths import PixelRule
    from .checking.pictures import SizeLimits
    from .checking.result import CheckReport
    from .conversion import convert
    from .formats import FORMATS, Format
    from .grounding import rescale_boxes
    from .heads import head
    from .pipeline import check, read, read_each
    from .sources import Source
    from .statistics import Statistics, stats

# What decodes JSON is imported with these, at their first use.
_LATER = {
    "convert": "conversion",
    "check": "pipeline",
    "read": "pipeline",
    "read_each": "pipeline",
    "Source": "sources",
    "Format": "formats",
    "FORMATS": "formats",
    "CheckReport": "checking.result",
    "PixelRule": "checking.lengths",
    "SizeLimits": "checking.pictures",
    "rescale_boxes": "grounding",
    "head": "heads",
    "stats": "statistics",
    "Statistics": "statistics",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


__version__ = "0.1.0"

__all__ = [
    "convert",
    "check",
    "read",
    "read_each",
    "Sample",
    "Message",
    "Source",
    "Report",
    "Problem",
    "CheckReport",
    "PixelRule",
    "SizeLimits",
    "stats",
    "Statistics",
    "head",
    "rescale_boxes",
    "image_token_count",
    "resized_size",
    "Format",
    "FORMATS",
    "DataFormatError",
    "FormatError",
    "ParseError",
    "RecordError",
    "BadSamplesError",
    "ResumeError",
    "MissingPackageError",
    "OptionError",
    "FolderError",
    "TargetError",
]
