"""The command, on a problem in a script of the folder that one is in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_cache import Schedule
from dit_cache.cli import main

PROBLEM = """
from toy_flow import ToyFlow, samples


def problem(steps=12, count=3):
    flow = ToyFlow(steps)
    return {"run": flow.run, "sigmas": flow.sigmas, "calibration": samples(0, count), "validation": samples(9, count),
            "batch": count}


def nothing():
    return None


def failing(kind=0):
    if kind:
        raise ValueError("no such kind")
    raise ZeroDivisionError
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # A name of its own for each test: an imported module stays.
    (tmp_path / f"script_{tmp_path.name}.py").write_text(PROBLEM)
    return tmp_path


def found(folder: Path, *more: str, name: str = "problem") -> int:
    return main(["search", f"script_{folder.name}:{name}", *more])


def test_a_schedule_is_found_written_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(folder, "--budget", "0.5", "--output", "half.json", "--trials", "2") == 0
    told = capsys.readouterr()
    assert "takes the time of up to" in told.err
    schedule = Schedule.load("half.json")
    assert schedule.plan in told.out
    assert len(schedule.computed) == 6
    assert sorted(path.suffix for path in folder.iterdir() if path.is_file()) == [".json", ".py"], "no journal is left"
    assert main(["show", "half.json"]) == 0
    assert capsys.readouterr().out == told.out
    assert main(["show", "half.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == schedule.plan


def test_settings_reach_the_problem(folder: Path) -> None:
    assert found(folder, "--budget", "0.5", "--output", "s.json", "--set", "steps=8", "--set", "count=2") == 0
    schedule = Schedule.load("s.json")
    assert len(schedule.plan) == 8
    assert len(schedule.calibration) == 2


def test_all_budgets_give_a_folder_with_a_plot(folder: Path) -> None:
    assert found(folder, "--budget", "all", "--output", "front", "--set", "steps=8") == 0
    files = sorted(path.name for path in (folder / "front").iterdir())
    assert files[0] == "front.png"
    assert (folder / "front" / "front.png").read_bytes().startswith(b"\x89PNG")
    shares = [Schedule.load(folder / "front" / name).flops_share for name in files[1:]]
    assert len(shares) > 4
    assert shares[-1] == 1.0


def test_nothing_is_overwritten_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "half.json").write_text("mine")
    assert found(folder, "--budget", "0.5", "--output", "half.json") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "half.json").read_text() == "mine"
    assert found(folder, "--budget", "0.5", "--output", "half.json", "--overwrite", "--trials", "0") == 0


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("missing", (), "cannot be found"),
        ("nothing", (), "did not return the arguments of a search"),
        ("problem", ("--set", "steps"), "no NAME=VALUE"),
        ("problem", ("--set", "count=0"), "batch is 0"),
        ("problem", ("--set", "stepz=3"), "stepz"),
        ("failing", ("--set", "kind=1"), "refuses: no such kind"),
    ],
)
def test_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, more: tuple[str, ...], words: str
) -> None:
    assert found(folder, "--budget", "0.5", "--output", "x.json", *more, name=name) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "x.json").exists()


@pytest.mark.parametrize("budget", ["0", "2", "half"])
def test_budgets_that_are_none(folder: Path, budget: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        found(folder, "--budget", budget, "--output", "x.json")
    assert stopped.value.code == 2


def test_a_defect_of_the_problem_shows_where_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(folder, "--budget", "0.5", "--output", "x.json", name="failing") == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_file_that_is_no_schedule(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "x.json").write_text("{}")
    assert main(["show", "x.json"]) == 2
    assert "no schedule" in capsys.readouterr().err
    assert main(["show", "none.json"]) == 2
