"""The tables agree with what is published, and with themselves."""

from __future__ import annotations

import pytest

from ascend_envcheck.compat.candidates import hdk_record
from ascend_envcheck.tables import (
    CPU_INDEX,
    builds_for,
    cross_pairing,
    find_torch_npu,
    pairings,
    pip_install,
    records,
    torch_npu_rows,
    torch_requirement,
)
from ascend_envcheck.versions import cann_version, release

CONFIDENCE = {"official", "official-history", "derived", "inferred"}


# From the compatibility table in the README of Ascend/pytorch; the first is the set of the walk-through.
@pytest.mark.parametrize(
    ("torch", "torch_npu", "cann"),
    [
        ("2.6.0", "2.6.0", "8.2.RC1"),
        ("2.7.1", "2.7.1", "8.3.RC1"),
        ("2.7.1", "2.7.1.post2", "8.5.0"),
        ("2.8.0", "2.8.0.post4", "9.0.0"),
        ("2.12.0", "2.12.0", "9.1.0"),
        ("2.1.0", "2.1.0.post17", "8.3.RC1"),
    ],
)
def test_published_pairs(torch: str, torch_npu: str, cann: str) -> None:
    row = find_torch_npu(torch_npu)
    assert row is not None
    assert (row.torch, row.cann, row.confidence) == (torch, cann, "official")


def test_every_row_is_sound() -> None:
    rows = torch_npu_rows()
    assert len({row.torch_npu for row in rows}) == len(rows)
    for row in rows:
        assert release(row.torch) == release(row.torch_npu)
        assert row.status in {"general", "patch", "pre-release", "unlisted"}
        assert row.confidence in CONFIDENCE
        assert row.source
        assert not row.cann or cann_version(row.cann) == row.cann
        first, _, last = row.python_documented.partition("-")
        assert not first or release(first) is not None is not release(last)
        assert not first or row.supports(first)
    for name in ("cross", "torchvision"):
        for pair in pairings(name):
            assert pair.confidence in CONFIDENCE
            assert pair.source


def test_newest_first() -> None:
    releases = [release(row.torch) for row in torch_npu_rows()]
    assert releases == sorted(releases, key=lambda found: found or (0, 0, 0), reverse=True)
    assert builds_for("2.7.1")[0].torch_npu == "2.7.1.post8"


def test_builds_for_a_cann() -> None:
    assert [row.torch_npu for row in builds_for("2.7.1+cpu", "8.5.0")] == ["2.7.1.post2"]
    assert builds_for("2.7.1", "1.0.0") == []
    assert builds_for("no version") == []


def test_a_local_label_is_of_no_account() -> None:
    assert find_torch_npu("2.7.1.post2+gitabc") is find_torch_npu("2.7.1.post2")
    assert find_torch_npu("99.0.0") is None


def test_python_by_document_or_by_wheel() -> None:
    row = find_torch_npu("2.6.0.post5")  # documented up to 3.11, wheels up to 3.12
    assert row is not None
    assert [row.supports(python) for python in ("3.8", "3.9", "3.11", "3.12", "3.13")] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_series_that_mix() -> None:
    new, old = find_torch_npu("2.7.1.post2"), find_torch_npu("2.6.0")
    assert new is not None
    assert old is not None
    assert cross_pairing(new, "9.1.0") is not None
    assert cross_pairing(new, "8.3.RC1") is None
    assert cross_pairing(old, "8.5.0") is None


def test_torchvision_follows_torch() -> None:
    """Each torch 2.N came out with torchvision 0.(N+15)."""
    for pair in pairings("torchvision"):
        assert int(pair.fits.split(".")[1]) == int(pair.of.split(".")[1]) + 15


# Requires-Dist of the wheels on PyPI: x86-64 pins torch==X+cpu up to 2.11, torch==2.12.0 in 2.12; aarch64 has no label.
@pytest.mark.parametrize(
    ("torch_npu", "machine", "torch"),
    [
        ("2.7.1.post2", "x86_64", "torch==2.7.1+cpu"),
        ("2.11.0", "x86_64", "torch==2.11.0+cpu"),
        ("2.12.0", "x86_64", "torch==2.12.0"),
        ("2.7.1.post2", "aarch64", "torch==2.7.1"),
        ("2.7.1.post2", "", "torch==2.7.1"),
    ],
)
def test_the_torch_that_a_build_asks_for(torch_npu: str, machine: str, torch: str) -> None:
    row = find_torch_npu(torch_npu)
    assert row is not None
    assert torch_requirement(row, machine) == torch
    line = pip_install(row, machine, "numpy")
    assert line.startswith(f"pip install {torch} torch_npu=={torch_npu} numpy")
    assert line.endswith(CPU_INDEX) == ("+cpu" in torch)


STACKED = {*CONFIDENCE, "secondary", "tested-list"}


@pytest.mark.parametrize("name", ["hdk", "mindspeed_mm", "mindie_sd", "lifecycle", "cann_packages"])
def test_every_row_has_a_source_and_says_how_sure_it_is(name: str) -> None:
    for record in records(name):
        assert record["source"]
        assert record["confidence"] in STACKED
        assert None not in record.values()


def test_the_stacks_name_builds_that_are_there() -> None:
    trains = {row.release for row in torch_npu_rows()}
    torches = {row.torch for row in torch_npu_rows()}
    for name in ("mindspeed_mm", "mindie_sd"):
        for record in records(name):
            assert set(record["torch_npu_release"].split()) <= trains
            assert set(record["torch"].split()) <= torches


def test_every_cann_of_a_general_release_has_its_hdk() -> None:
    for cann in {row.cann for row in torch_npu_rows() if row.status == "general"} - {"7.0.RC1"}:
        found = hdk_record(cann)
        assert found is not None
        assert found["confidence"] != "inferred"
