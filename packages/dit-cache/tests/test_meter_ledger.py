"""The record of a generation, its reports and its pictures."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path

import pytest

from dit_cache import Entry, Ledger, PlotError, PlotUnavailable, plot_front
from dit_cache.errors import CacheError

FRONTS = {"searched": [(0.5, 45.0), (0.3, 38.0), (0.4, 43.0)], "fewer steps": [(0.3, 27.0), (0.5, math.inf)]}


def ledger(branches: tuple[str, ...] = ("cond", "uncond"), errors: bool = True) -> Ledger:
    """Six steps, of which 0, 1, 3 and 5 are computed."""
    held = Ledger()
    for step, mark in enumerate("CC.C.C"):
        for branch in branches:
            known = {"predicted_error": 0.01 * step, "realised_error": 0.02 * step} if mark == "." and errors else {}
            reason = "warm-up" if step < 2 else "schedule"
            held.record(Entry(step=step, branch=branch, computed=mark == "C", reason=reason, **known))
    return held


def test_counts() -> None:
    held = ledger()
    assert (held.computed, held.skipped, held.share) == (8, 4, 8 / 12)
    assert held.reasons == {"schedule": 8, "warm-up": 4}
    assert list(held.reasons) == ["schedule", "warm-up"]


def test_an_empty_one() -> None:
    held = Ledger()
    assert (held.computed, held.skipped, held.share, held.reasons) == (0, 0, 1.0, {})
    assert held.report().splitlines()[0] == "computed 0 of 0 (100.0%)"
    assert json.loads(held.report("json"))["entries"] == []


def test_bytes_at_most_and_now() -> None:
    held = Ledger()
    for count in (5, 3 * 2**20, 7):
        held.hold(count)
    assert (held.bytes_held, held.bytes_now) == (3 * 2**20, 7)
    assert "at most 3.0 MiB, now 7 B" in held.report()


def test_text() -> None:
    held = ledger()
    held.hold(100)
    held.flops_share = 0.675
    assert held.report().splitlines() == [
        "computed 8 of 12 (66.7%), 67.5% of the operations",
        "cond             CC·C·C",
        "uncond           CC·C·C",
        "reasons          schedule 8, warm-up 4",
        "held             at most 100 B, now 100 B",
        "predicted error  mean 0.03, at most 0.04, over 4",
        "realised error   mean 0.06, at most 0.08, over 4",
    ]


def test_text_of_steps_with_several_decisions_and_with_none() -> None:
    held = Ledger()
    for step, computed in ((0, True), (2, True), (2, False), (4, False), (4, False)):
        held.record(Entry(step=step, branch="block", computed=computed, reason="gate"))
    assert "block    C ± ·" in held.report().splitlines()


def test_json_is_complete_and_strict() -> None:
    held = ledger(branches=("cond",))
    held.hold(5)
    held.record(
        Entry(step=6, branch="cond", computed=True, reason="guard", indicator=math.inf, realised_error=math.nan)
    )
    read = json.loads(held.report("json"), parse_constant=pytest.fail)
    entries = read.pop("entries")
    assert read == {
        "version": 1,
        "computed": 5,
        "skipped": 2,
        "share": 5 / 7,
        "flops_share": None,
        "bytes_now": 5,
        "bytes_held": 5,
        "reasons": {"schedule": 4, "warm-up": 2, "guard": 1},
    }
    assert entries[:-1] == [asdict(entry) for entry in held.entries[:-1]]
    assert (entries[-1]["indicator"], entries[-1]["realised_error"]) == ("inf", "nan")


def test_other_formats() -> None:
    with pytest.raises(ValueError, match="'yaml', legal are 'text' and 'json'"):
        ledger().report("yaml")  # type: ignore[arg-type]


def is_picture(path: Path) -> bool:
    """The magic number and size of a png, or an svg root."""
    if path.suffix.lower() == ".svg":
        return ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    head = path.read_bytes()[:24]
    return head[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", head[16:])) > 100


@pytest.mark.parametrize("name", ["a.svg", "a.png", "a.PNG"])
@pytest.mark.parametrize("errors", [True, False])
def test_plot_of_decisions(tmp_path: Path, name: str, errors: bool) -> None:
    path = tmp_path / name
    path.write_text("older")
    ledger(errors=errors).plot(path)
    assert is_picture(path)
    assert list(tmp_path.iterdir()) == [path]


def test_plot_of_an_error_of_zero(tmp_path: Path) -> None:
    held = ledger()
    held.record(Entry(step=6, branch="cond", computed=False, reason="schedule", realised_error=0.0))
    held.plot(tmp_path / "a.svg")
    assert is_picture(tmp_path / "a.svg")


@pytest.mark.parametrize("name", ["front.svg", "front.png"])
def test_plot_of_fronts(tmp_path: Path, name: str) -> None:
    plot_front(str(tmp_path / name), FRONTS, xlabel="share", ylabel="dB", title="Quality")
    assert is_picture(tmp_path / name)
    first = (tmp_path / name).read_bytes()
    plot_front(tmp_path / name, FRONTS, xlabel="share", ylabel="dB", title="Quality")
    assert (tmp_path / name).read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 1


def test_plots_leave_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_front(tmp_path / "a.svg", FRONTS)
    assert dict(matplotlib.rcParams) == before


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match=r"'.gif', legal are .svg and .png"):
        plot_front(tmp_path / "a.gif", FRONTS)
    with pytest.raises(PlotError, match="no finite point in one, two"):
        plot_front(tmp_path / "a.svg", {"one": [], "two": [(0.5, math.nan)]})
    with pytest.raises(PlotError, match="no finite point in no method"):
        plot_front(tmp_path / "a.svg", {})
    with pytest.raises(PlotError, match="nothing was recorded"):
        Ledger().plot(tmp_path / "a.svg")
    with pytest.raises(FileNotFoundError):
        plot_front(tmp_path / "missing" / "a.svg", FRONTS)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_fails_half_way_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fail(self: Figure, path: Path, **how: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    path = tmp_path / "a.svg"
    path.write_text("older")
    with pytest.raises(OSError, match="disk full"):
        plot_front(path, FRONTS)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for kind in (PlotUnavailable, ImportError, CacheError):
        with pytest.raises(kind, match=r'pip install "dit-cache\[plot\]"'):
            plot_front(tmp_path / "a.svg", FRONTS)


def test_the_import_takes_no_matplotlib() -> None:
    code = "import sys, dit_cache.meter; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
