"""Schedule files: what is refused, what is derived, what is used as it is."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit_cache import CacheWarning, GenerationError, Made, Schedule, ScheduleError, ScheduleMismatch, model_digest

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.2)


@pytest.fixture
def schedule() -> Schedule:
    return Schedule(
        plan="CCfC1",
        sigmas=SIGMAS,
        fitted={2: {0: -0.5, 1: 1.5}},
        made=Made(model="sha256:1", solver="unipc", shift=5.0, guidance=5.0, settings={"frames": 81}),
        calibration=('["a", 1]',),
        validation=('["b", 2]',),
        score=40.5,
        envelope={1: (0.1, 0.2)},
    )


def test_a_file_gives_back_what_was_saved(schedule: Schedule, tmp_path: Path) -> None:
    file = schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(file) == schedule
    assert json.loads(file.read_text())["flops_share"] == 0.6
    assert [each.name for each in tmp_path.iterdir()] == ["schedule.json"]


def test_nothing_is_overwritten_unasked(schedule: Schedule, tmp_path: Path) -> None:
    file = schedule.save(tmp_path / "schedule.json")
    with pytest.raises(ScheduleError, match="exists"):
        replace(schedule, score=1.0).save(file)
    replace(schedule, score=1.0).save(file, overwrite=True)
    assert Schedule.load(file).score == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "no schedule"),
        ({"version": 2}, "version 2"),
        ({"plan": "C?C"}, "the plan is"),
        ({"plan": "0CCCC"}, "begin with C"),
        ({"sigmas": [1.0, 0.5]}, "2 sigmas for 5 steps"),
        ({"sigmas": [1.0, 0.9, 0.9, 0.5, 0.2]}, "all different"),
        ({"fitted": {}}, "fitted holes"),
        ({"fitted": {"2": {"1": 0.5, "4": 0.5}}}, "not for the last computed"),
        ({"fitted": {"2": {"1": float("nan")}}}, "not for the last computed"),
        ({"made": {"modle": "x"}}, "damaged"),
        ({"calibration": None}, "damaged"),
        ({"calibration": "abc"}, "damaged"),
        ({"score": "high"}, "damaged"),
        ({"errors": {"2": "much"}}, "damaged"),
    ],
)
def test_files_that_are_no_schedule(schedule: Schedule, tmp_path: Path, change: dict[str, object], words: str) -> None:
    file = schedule.save(tmp_path / "schedule.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ScheduleError, match=words):
        Schedule.load(file)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_files_that_are_something_else(tmp_path: Path, text: str) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(text)
    with pytest.raises(ScheduleError, match=r"schedule\.json"):
        Schedule.load(file)
    with pytest.raises(ScheduleError, match="cannot be read"):
        Schedule.load(tmp_path / "none.json")


def test_the_same_run_takes_it_as_it_is(schedule: Schedule) -> None:
    assert schedule.adapted((*SIGMAS, 0.0), schedule.made) is schedule
    assert schedule.adapted(SIGMAS) is schedule  # what is unknown is not compared


def test_another_model_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ScheduleMismatch, match="search one"):
        schedule.adapted(SIGMAS, replace(schedule.made, model="sha256:2"))


@pytest.mark.parametrize("change", [{"solver": "euler"}, {"guidance": 3.0}, {"settings": {"frames": 5}}])
def test_another_solver_or_guidance_warns(schedule: Schedule, change: dict[str, Any]) -> None:
    with pytest.warns(CacheWarning, match=next(iter(change))):
        assert schedule.adapted(SIGMAS, replace(schedule.made, **change)) is schedule


@pytest.mark.parametrize("steps", [2, 5, 7, 10, 50])
def test_other_steps_are_derived_with_a_warning(schedule: Schedule, steps: int) -> None:
    levels = [1 - (n / steps) ** 2 for n in range(steps)]
    with pytest.warns(CacheWarning, match="derived"):
        derived = schedule.adapted([*levels, 0.0])
    assert len(derived.plan) == steps
    assert len(derived.computed) == max(1, round(0.6 * steps))
    assert derived.score is None
    assert not derived.fitted


def test_a_cache_runs_no_generation_that_it_was_not_made_for(schedule: Schedule) -> None:
    for legal in (SIGMAS, (*SIGMAS, 0.0), (*SIGMAS, 0.01), len(SIGMAS)):
        with schedule.cache().generation(legal):
            pass
    for other in (SIGMAS[:4], [level - 0.05 for level in SIGMAS], 6):
        with pytest.raises(GenerationError, match="adapted"), schedule.cache().generation(other):
            raise AssertionError


def test_steps_are_added_only_where_it_is_known_what_is_usual(schedule: Schedule) -> None:
    with pytest.raises(ScheduleError, match="from 4 calibration samples on, this schedule has 1"):
        schedule.cache(extra=1)


def test_a_derived_schedule_repeats_values(schedule: Schedule) -> None:
    """Polynomials through values far apart leave the video; what was computed last does not."""
    with pytest.warns(CacheWarning, match="derived"):
        assert set(schedule.adapted([1.0, 0.8, 0.6, 0.4, 0.2, 0.1]).plan) == {"C", "0"}


def test_what_is_derived_is_as_dense_over_sigma() -> None:
    """Dense near noise in, dense near noise out."""
    steps = 20
    levels = [1 - n / steps for n in range(steps)]
    dense_early = Schedule(plan="C" * 8 + "111C" * 3, sigmas=tuple(levels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        derived = dense_early.adapted([1 - n / 40 for n in range(40)])
    early = sum(derived.sigmas[step] > 0.6 for step in derived.computed)
    assert 14 <= early <= 18  # 8 of 11 computed steps lie above 0.6, of 22 then 16


def test_equal_weights_have_one_digest_whatever_their_dtype() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 20)
    model = nn.Sequential(linear, nn.LayerNorm(20))
    digest = model_digest(model)
    assert model_digest(model.bfloat16()) == digest
    with torch.no_grad():
        linear.weight[0, 0] += 1
    assert model_digest(model) != digest
    assert model_digest(nn.Linear(300, 20)) != digest
