"""LLaVA-style image conversations to the messages/images JSON of MindSpeed MM, streamed, with every record checked.

::

    from mm_datafmt import check, convert, image_token_count, read

    convert("llava.json", "data/train.json", image_dir="data/images")     # all records clean, or no train.json
    report = check("data/train.json")                                     # again, any time
    assert report.ok, report.describe()

    for sample in read("data/train.json"):                                # one record in memory at a time
        print(sample.images, sample.messages[-1].content)

    image_token_count(640, 480, pixel_cap=262144)                         # 336, from the size alone

Files are one JSON array or JSON lines, in one of :data:`FORMATS`; the first record tells which. Pillow and ijson are
imported when the first file is opened.
"""

from .errors import (
    BadSamplesError,
    DataFormatError,
    FolderError,
    FormatError,
    ParseError,
    RecordError,
    TargetError,
)
from .formats import FORMATS, Format
from .pipeline import check, convert, read
from .report import Problem, Report
from .sample import Message, Sample
from .tokens import image_token_count

__version__ = "0.1.0"

__all__ = [
    "convert",
    "check",
    "read",
    "Sample",
    "Message",
    "Report",
    "Problem",
    "image_token_count",
    "Format",
    "FORMATS",
    "DataFormatError",
    "FormatError",
    "ParseError",
    "RecordError",
    "BadSamplesError",
    "FolderError",
    "TargetError",
]
