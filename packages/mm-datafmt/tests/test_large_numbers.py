"""Integers of more than 64 bits, which a fast decoder makes floats: they are kept to the last digit, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_datafmt import convert, read
from mm_datafmt.decoding import decode, encode

WriteFile = Callable[..., Path]

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
LARGE = (1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1, 123456789012345678901234567890)
values = st.recursive(
    st.integers(-(2**100), 2**100) | st.floats(allow_nan=False, allow_infinity=False) | st.text("a:\\é", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("a:", max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(values)
def test_there_and_back(value: Any) -> None:
    assert decode(json.dumps(value).encode()) == value
    assert json.loads(encode(value)) == value
    assert b"\n" not in encode(value)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("layout", ["array", "lines"])
def test_extra_fields_keep_them(
    tmp_path: Path, write_array: WriteFile, write_lines: WriteFile, layout: str, workers: int
) -> None:
    records = [{"id": number, "conversations": TURNS, "x": {"y": [number, 1e300]}} for number in LARGE]
    source = write_array(records) if layout == "array" else write_lines(records)
    report = convert(source, tmp_path / "out.jsonl", target_format="sharegpt", workers=workers)
    assert report.ok
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(record["id"], record["x"]["y"]) for record in written] == [(n, [n, 1e300]) for n in LARGE]
    assert all(type(record["id"]) is int for record in written)
    assert [sample.extra and sample.extra["id"] for sample in read(source)] == list(LARGE)
    back = convert(source, tmp_path / "out.json", workers=workers)  # messages has no place for them
    assert (back.ok, back.lost) == (True, {"id": 6, "x": 6})


def test_tools_calls_and_bad_records_keep_them(tmp_path: Path, write_lines: WriteFile) -> None:
    large = LARGE[-1]
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"n": large})}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "a"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "limit": large}}]
    source = write_lines([{"messages": turns, "tools": tools}, {"messages": 5, "id": large}])
    report = convert(source, tmp_path / "out.jsonl", on_bad="skip")
    assert (report.written, report.rejected) == (1, 1)
    (sample,) = read(tmp_path / "out.jsonl")
    assert json.loads(sample.tools or "")[0]["function"]["limit"] == large
    assert json.loads(sample.messages[1].content) == {"name": "f", "arguments": {"n": large}}
    (entry,) = (tmp_path / "out.bad.jsonl").read_text().splitlines()
    assert json.loads(entry)["value"]["id"] == large
    convert(tmp_path / "out.jsonl", tmp_path / "back.jsonl", target_format="openai")
    back = json.loads((tmp_path / "back.jsonl").read_text())
    assert (back["tools"], back["messages"][1]["tool_calls"]) == (
        tools,
        [{**call, "function": {"name": "f", "arguments": f'{{"n":{large}}}'}}],
    )
