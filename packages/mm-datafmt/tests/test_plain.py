"""The short way beside the long one: the same records, faults and counts, whatever the records are."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import orjson
import pytest
from fuzz_records import RECORDS, spoil
from hypothesis import given
from hypothesis import strategies as st

from mm_datafmt import FORMATS
from mm_datafmt.emitting import Emitter
from mm_datafmt.judging import Judge
from mm_datafmt.media import MediaFolder
from mm_datafmt.plain import PlainPath
from mm_datafmt.splitting import Cursor, Run

PLAIN = ("llava", "sharegpt", "messages")
TALK = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
KINDS = {**RECORDS, "messages": [*RECORDS["messages"], {"messages": TALK, "images": ["a.png"], "id": 1}]}


def emitters(name: str, folder: Path, *, repair: bool = False) -> tuple[Emitter, Emitter]:
    """One with the short way and one without, which share nothing."""
    made = []
    for short in (True, False):
        judge = Judge(FORMATS[name], MediaFolder(folder, folder, check="none"), repair=repair)
        emitter = Emitter([judge], FORMATS["messages"], b"\n")
        if not short:
            emitter._plain = [None]
        made.append(emitter)
    assert made[0]._plain[0] is not None
    return made[0], made[1]


def run_of(records: list[Any]) -> Run:
    text = ",\n".join(json.dumps(record) for record in records).encode()
    return Run(Cursor(), orjson.loads(b"[%b]" % text), text, "array", Cursor())


def told(emitter: Emitter, run: Run) -> object:
    """All that an emitter says, faults as text."""
    outcome = emitter(0, run)
    bad = [(one.place, [(fault.code, str(fault)) for fault in one.faults], one.mended) for one in outcome.bad]
    return outcome._replace(bad=[]), bad


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_spoiled_records(name: str, repair: bool, tmp_path: Path) -> None:
    rng = random.Random(f"{name} {repair}")
    records = []
    for _ in range(1500):
        record = copy.deepcopy(rng.choice(KINDS[name if rng.random() < 0.8 else rng.choice(PLAIN)]))
        for _ in range(rng.choice((0, 1, 1, 2))):
            if record:
                spoil(record, rng)
        if "\\ud800" not in json.dumps(record):  # refused by the decoder
            records.append(record)
    short, long = emitters(name, tmp_path, repair=repair)
    assert told(short, run_of(records)) == told(long, run_of(records))
    taken = sum(short._plain[0](record) is not None for record in records if short._plain[0] is not None)
    assert taken > len(records) / 20, "some took the short way"


texts = st.text(st.sampled_from("a<é图 \n\0"), max_size=3) | st.sampled_from(
    ["<image>", "<video>", "q <audio>", "<<image>", "<image", "<image>\n<image>", " ", "text", "<b>"]
)
values = st.none() | st.booleans() | st.integers() | st.lists(texts, max_size=2) | texts
turns = st.lists(
    st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "system", "user", "tool"]) | values, "value": texts | values},
        optional={"loss": values, "x": values},
    )
    | values,
    max_size=4,
)
talks = st.sampled_from(
    [[{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}], [{"from": "gpt", "value": "a"}]]
)
records = st.fixed_dictionaries(
    {"conversations": talks | turns | values},
    optional={
        "image": st.sampled_from(["a.png", "data:x", "../x", "a b/c.png", ""]) | values,
        "images": values,
        "video": values,
        "id": values,
        "x": st.dictionaries(texts, values, max_size=2),
    },
)


@given(st.lists(records | values, max_size=6), st.sampled_from(PLAIN[:2]))
def test_any_records(some: list[Any], name: str) -> None:
    short, long = emitters(name, Path("/"))
    assert told(short, run_of(some)) == told(long, run_of(some))


def test_what_takes_the_short_way(tmp_path: Path) -> None:
    """The records of the published sets do; a set of them is measured in benchmarks/datafmt.py."""
    path = emitters("llava", tmp_path)[0]._plain[0]
    assert isinstance(path, PlainPath)
    talk = [{"from": "human", "value": "<image>\nWhich bus < 5?"}, {"from": "gpt", "value": "Süß 图"}]
    written = path({"id": "1", "image": "a/b.png", "conversations": talk})
    assert written == (
        '{"messages":[{"role":"user","content":"<image>\\nWhich bus < 5?"},{"role":"assistant","content":"Süß 图"}],'
        '"images":["a/b.png"]}'.encode(),
        ("id",),
    )
    assert path({"image": "a/b.png", "conversations": talk[:1]}) is None
