"""Two processes that read one data set, over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_worlds import world
from layouts import ask

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("exchange") / "data"
    world(folder, count=12)
    (rows,) = ask("data_worker.py", 2, folder, [{"mini": str(mini)}])
    by_case: Results = {}
    for row in sorted(rows, key=lambda row: row["rank"]):
        by_case.setdefault(row["case"], []).append(row)
    assert all(len(pair) == 2 for pair in by_case.values())
    return by_case


def test_a_tensor_parallel_pair_decodes_once_and_holds_the_same_pixels(results: Results) -> None:
    first, second = results["tensor"]
    assert (first["role"], second["role"]) == ("read", "receive")
    assert first["decoded"] > 0
    assert second["decoded"] == 0
    assert first["steps"] == second["steps"]
    assert any(pixels for step in first["steps"] for pixels in step["pixels"])


def test_a_later_stage_decodes_nothing_and_gets_nothing(results: Results) -> None:
    first, second = results["pipeline"]
    assert (first["role"], second["role"]) == ("read", "none")
    assert second["decoded"] == 0
    for one, other in zip(first["steps"], second["steps"], strict=True):
        assert (one["numbers"], one["loss"], one["bad"]) == (other["numbers"], other["loss"], other["bad"])
        assert set(other["pixels"]) == {None}
    assert first["steps"] == results["tensor"][0]["steps"], "the layout of the model changes nothing"


def test_data_ranks_share_a_step_and_know_of_each_others_bad_records(results: Results) -> None:
    first, second = results["data"]
    whole = results["tensor"][0]
    for one, other, all_of_it in zip(first["steps"], second["steps"], whole["steps"], strict=True):
        numbers = [n for step in (one, other) for row in step["numbers"] for n in row]
        assert sorted(numbers) == sorted(n for row in all_of_it["numbers"] for n in row)
        assert one["bad"] == other["bad"]
    lost = [step for step in second["steps"] if any(5 in row for row in step["numbers"])]
    for step in lost:
        [weight] = [
            loss
            for row, losses in zip(step["numbers"], step["loss"], strict=True)
            for number, loss in zip(row, losses, strict=True)
            if number == 5
        ]
        assert (step["bad"], weight) == ([5], 0.0)


def test_an_error_of_the_first_process_is_told_to_all(results: Results) -> None:
    first, second = results["refused"]
    assert first["error"] == second["error"]
    assert "data.seq_length is 20" in first["error"]
