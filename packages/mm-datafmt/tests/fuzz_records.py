"""Records of every format, spoiled at random, converted in small files; what must hold of each file is asserted.

python fuzz_records.py RECORDS [SEED]
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from mm_datafmt import FORMATS, BadSamplesError, DataFormatError, Report, check, convert, read

RECORDS_A_FILE = 50
WRITTEN = ("llava", "sharegpt", "alpaca", "openai", "messages")
TURNS = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "Süß 图"}]
MESSAGES = [{"role": "user", "content": "q <image>"}, {"role": "assistant", "content": "a", "loss": 0.5}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2]}'}}
RECORDS: dict[str, list[Any]] = {
    "llava": [
        {"id": "1", "image": "a.png", "conversations": TURNS},
        {"image": ["a.png", "b/c.png"], "conversations": [{"from": "human", "value": "<image><image>"}, TURNS[1]]},
        {"video": "v.mp4", "conversations": TURNS},
    ],
    "sharegpt": [
        {"conversations": TURNS, "images": ["a.png"], "system": "s", "tools": '[{"name": "f"}]'},
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ]
        },
    ],
    "alpaca": [
        {"instruction": "<image> q", "input": "i", "output": "a", "history": [["b", "c"]], "images": ["a.png"]},
        {"instruction": "q", "output": "a", "system": "s"},
    ],
    "openai": [
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "a.png"}}],
                },
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "1"},
                {"role": "assistant", "content": "a"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        }
    ],
    "messages": [
        {"messages": MESSAGES, "images": ["a.png"], "videos": [], "id": 7},
        {"messages": [{"role": "system", "content": "s"}, *MESSAGES], "images": ["a.png"], "audios": None},
    ],
}
COCO = {
    "info": {"year": 2017},
    "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 6}, {"id": 2, "file_name": "b.png"}],
    "annotations": [
        {"id": 5, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3.5, 4], "iscrowd": 0, "caption": "a cat"},
        {"id": 6, "image_id": 2, "category_id": 3, "bbox": [0, 0, 1, 1], "iscrowd": 1, "caption": "two"},
    ],
    "categories": [{"id": 3, "name": "cat"}],
}
JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1 << 63,
        1 << 70,
        1e308,
        "",
        " ",
        "\0",
        "\ud800",
        "<image>",
        "<video><audio>",
        "a" * 5000,
    ),
    *([], {}, [[]], [None], {"": None}, "../../etc/passwd", "/etc/passwd", "data:image/png;base64,AA", "a\nb", "[1]"),
    *("human", "gpt", "system", "tool", "function", "assistant", [["q", "a"]], {"url": "x"}, {"url": 5}, '{"name": 1}'),
)
NAMES = ("images", "image", "videos", "tools", "system", "messages", "conversations", "role", "content", "loss", "from")
PIECES = (
    b"\0",
    b"\xff",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"NaN",
    b"\\ud800",
    b"9" * 400,
    b"[" * 99,
)

DEEP = re.compile(rb'"@(\d+)@"')
"""Stands for a list nested so deep: Python's own encoder could not write it."""


def spoil(record: Any, rng: random.Random) -> None:
    """Change one place of a record: another value, a key more or less or of another name, an entry twice."""
    at = record
    while True:
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if not isinstance(at[key], (dict, list)) or not at[key] or rng.random() < 0.2:
            break
        at = at[key]
    kind = rng.randrange(6)
    junk = copy.deepcopy(rng.choice(JUNK))
    if kind == 0 and isinstance(at, dict):
        at[rng.choice(NAMES)] = junk
    elif kind == 1:
        del at[key]
    elif kind == 2 and isinstance(at, list):
        at.append(copy.deepcopy(at[key]))
    elif kind == 3:
        at[key] = f"@{rng.choice((1, 2, 60, 300, 700, 9999))}@"
    elif kind == 4 and isinstance(at[key], str):
        at[key] += str(junk)
    else:
        at[key] = junk


def spoiled_text(text: bytes, rng: random.Random) -> bytes:
    """Cut a piece out, put one in, or stop in the middle."""
    at = rng.randrange(len(text) + 1)
    end = at + rng.randrange(1, 40)
    return rng.choice((text[:at], text[:at] + text[end:], text[:at] + rng.choice(PIECES) + text[at:]))


def records_text(fmt: str, rng: random.Random) -> bytes:
    """An array or JSON lines of one format, most records spoiled."""
    lines = []
    for _ in range(RECORDS_A_FILE):
        record = copy.deepcopy(rng.choice(RECORDS[fmt if rng.random() < 0.95 else rng.choice(WRITTEN)]))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
            if record:
                spoil(record, rng)
        line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        line = DEEP.sub(lambda match: b"[" * int(match[1]) + b"1" + b"]" * int(match[1]), line)
        lines.append(spoiled_text(line, rng) if rng.random() < 0.1 else line)
    if rng.random() < 0.5:
        return b"\n".join(lines)
    text = b"[" + rng.choice((b",", b",\n", b" ,\r\n")).join(lines) + b"]"
    return spoiled_text(text, rng) if rng.random() < 0.1 else text


def coco_text(rng: random.Random) -> bytes:
    """A COCO file, spoiled."""
    value = copy.deepcopy(COCO)
    for _ in range(rng.choice((0, 1, 2, 4))):
        spoil(value, rng)
    text = json.dumps(value).encode()
    return spoiled_text(text, rng) if rng.random() < 0.2 else text


def try_file(folder: Path, rng: random.Random) -> tuple[int, int]:
    """Convert one file and assert what must hold; return how many records were read and written."""
    fmt = rng.choice(list(FORMATS))
    source, target = folder / "source.json", folder / rng.choice(("out.json", "out.jsonl"))
    source.write_bytes(records_text(fmt, rng) if fmt in WRITTEN else coco_text(rng))
    given, wanted = rng.choice((None, fmt)), rng.choice(WRITTEN)
    try:
        report = convert(
            *(source, target),
            source_format=given,
            target_format=wanted,
            on_bad=rng.choice(("skip", "repair")),
            shuffle=rng.random() < 0.2,
            media=rng.choice(("none", "none", "none", "exists")),
        )
    except DataFormatError as error:
        refusal = error
    else:
        require_sound(report, target, wanted)
        return report.records, report.written
    assert len(str(refusal)) < 20_000
    assert [path.name for path in folder.iterdir()] == ["source.json"], "a refusal leaves nothing"
    return (refusal.report.records, 0) if isinstance(refusal, BadSamplesError) else (0, 0)


def require_sound(report: Report, target: Path, wanted: str) -> None:
    """Raise AssertionError unless all records are accounted for, and what was written can be used."""
    assert report.written + report.rejected == report.records
    assert all(len(problem.message) < 3_000 for problem in report.problems)
    assert len(list(read(target, format=wanted))) == report.written
    found = check(target, source_format=wanted, media="none", ignore=("duplicate_record",), workers=1)
    assert found.ok, f"what was written has problems: {found.describe()}"
    bad = target.with_suffix(".bad.jsonl")
    entries = bad.read_bytes().splitlines() if bad.exists() else []
    assert len(entries) == report.bad_records
    assert all(json.loads(entry)["code"] for entry in entries)


def run(records: int, seed: int) -> tuple[int, int]:
    """Go on until so many were read; return how many were read and written. An AssertionError names the file's seed."""
    read_so_far, written, number = 0, 0, 0
    while read_so_far < records:
        with tempfile.TemporaryDirectory() as folder:
            try:
                more, good = try_file(Path(folder), random.Random(f"{seed} {number}"))
            except Exception as error:
                error.args = (f"seed {seed}, file {number}: {error}",)
                raise
        read_so_far, written, number = read_so_far + more, written + good, number + 1
        assert number < records, "most files can be read"
    return read_so_far, written


if __name__ == "__main__":
    print("read {}, wrote {}".format(*run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
