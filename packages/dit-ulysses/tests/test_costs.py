"""Costs as numbers and as a file."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dit_ulysses import Costs, PlanError
from dit_ulysses.costs import CONSTANTS

OTHERS = Costs(latency_inside=1e-3, attention_flops=1.5e11, ranks_per_node=4, measured=("latency_inside",))


def test_a_file_brings_back_what_was_saved(tmp_path: Path) -> None:
    assert Costs.load(OTHERS.save(tmp_path / "costs.json")) == OTHERS
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"], "no partial file is left"


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    target = tmp_path / "costs.json"
    target.write_text("mine")
    with pytest.raises(PlanError, match="exists; name another file, or say overwrite"):
        OTHERS.save(target)
    assert target.read_text() == "mine"
    OTHERS.save(str(target), overwrite=True)
    assert Costs.load(target) == OTHERS


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be written"):
        OTHERS.save(tmp_path / "none" / "costs.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanError, match="cannot be written"):
        OTHERS.save(tmp_path / "folder", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_file_leaves_out_stays_a_guess(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"format": "dit-ulysses costs", "version": 1, "ranks_per_node": 2}')
    assert Costs.load(tmp_path / "c.json") == Costs(ranks_per_node=2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"latency_insid": 1.0}, "'latency_insid' is none of the keys; did you mean latency_inside?"),
        ({"zzz": 1.0}, "there are latency_inside, "),
        ({"version": 2}, "version 2; this dit-ulysses reads 1"),
        ({"format": "other"}, "no costs of dit-ulysses; `dit-ulysses probe"),
        ({"matmul_flops": "fast"}, "matmul_flops is 'fast'; a number above 0"),
        ({"measured": ["matmul_flop"]}, "did you mean matmul_flops?"),
        ({"measured": 3}, "measured is 3; a list of names"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**OTHERS.as_dict(), **changed}))
    with pytest.raises(PlanError, match=re.escape(words)) as refused:
        Costs.load(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_files_that_are_no_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"c\.json"):
        Costs.load(tmp_path / "c.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Costs.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("latency_inside", 0, "above 0"),
        ("bandwidth_between", float("inf"), "above 0"),
        ("bandwidth_inside", True, "above 0"),
        ("ring_hidden", 1.5, "at most 1"),
        ("ranks_per_node", 1.5, "a whole number"),
    ],
)
def test_numbers_that_are_none(name: str, value: Any, words: str) -> None:
    with pytest.raises(PlanError, match=f"{name} is {value!r}.*{words}"):
        Costs(**{name: value})


def test_the_table_tells_every_number_and_whether_it_was_measured() -> None:
    assert list(CONSTANTS) == [item.name for item in fields(Costs) if item.name != "measured"]
    lines = dict(line.split(maxsplit=1) for line in str(OTHERS).splitlines())
    assert list(lines) == list(CONSTANTS)
    assert [name for name, line in lines.items() if line.endswith("measured")] == ["latency_inside"]
