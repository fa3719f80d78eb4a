"""Decisions on disk: shared by many processes, shipped as a file, and never in the way."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_fused_ops.dispatch import bucket
from dit_fused_ops.dispatch.search import relative_error
from dit_fused_ops.dispatch.store import Decision, Store, default_path, read_decisions, write_decisions
from dit_fused_ops.errors import TuningFileError

FAST = Decision(ranking=(("fast", 1.5), ("slow", 9.0)), rejected={"broken": "it raised"})


def test_what_was_put_is_read_back(tmp_path: Path) -> None:
    Store(tmp_path / "folder" / "t.json").put("key", FAST)
    assert read_decisions(tmp_path / "folder" / "t.json") == {"key": FAST}


def test_others_may_read_what_is_shipped(tmp_path: Path) -> None:
    write_decisions(tmp_path / "t.json", {"key": FAST})
    (tmp_path / "other").touch()
    assert (tmp_path / "t.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_without_a_file_decisions_last_as_long_as_the_store() -> None:
    store = Store(None)
    store.put("key", FAST)
    assert store.get("key") == FAST
    assert store.get("other") is None


CORRUPT = [
    "",
    "{",
    "[]",
    "\x00\xff",
    '{"format": 2, "decisions": {}}',
    '{"format": 1}',
    '{"format": 1, "decisions": []}',
    '{"format": 1, "decisions": {"k": {}}}',
    '{"format": 1, "decisions": {"k": {"ranking": [["a", "x"]], "rejected": {}}}}',
]


@pytest.mark.parametrize("text", CORRUPT)
def test_a_corrupt_file_costs_one_warning_and_is_rewritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(text.encode("latin-1"))
    store = Store(path)
    with pytest.warns(RuntimeWarning, match=r"t\.json is not a tuning file.*ignored, and replaced"):
        assert store.get("key") is None
    store.put("key", FAST)  # a second warning would be an error
    assert read_decisions(path) == {"key": FAST}


def test_a_corrupt_file_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(TuningFileError, match="remove it, or tune again"):
        read_decisions(path)


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    store = Store(tmp_path / "file" / "t.json")
    with pytest.warns(RuntimeWarning, match="last as long as this process"):
        store.put("a", FAST)
    store.put("b", FAST)  # a second warning would be an error
    assert store.get("a") == FAST


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    write_decisions(path, {"key": FAST})
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_decisions(path, {})
    assert read_decisions(path) == {"key": FAST}
    assert list(tmp_path.iterdir()) == [path]


def _put_many(path: Path, name: str) -> None:
    store = Store(path)
    for number in range(20):
        store.put(f"{name} {number}", FAST)


def test_processes_that_tune_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads; nothing of torch runs in them
        workers = [context.Process(target=_put_many, args=(path, name)) for name in "abc"]
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(read_decisions(path)) == 60


def test_a_store_sees_what_others_wrote_when_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    one, other = Store(path), Store(path)
    assert one.get("a") is None
    other.put("a", FAST)
    one.put("b", FAST)
    assert one.get("a") == FAST


def test_the_place_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("DIT_FUSED_OPS_TUNING", raising=False)
    assert default_path() == Path("/somewhere/dit-fused-ops/tuning.json")
    monkeypatch.setenv("DIT_FUSED_OPS_TUNING", "/shipped.json")
    assert default_path() == Path("/shipped.json")


def test_a_user_without_a_home_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIT_FUSED_OPS_TUNING", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_path() is None


@given(st.integers(1, 10**7))
def test_a_bucket_holds_lengths_of_a_quarter_octave(length: int) -> None:
    top = bucket(length)
    assert length <= top < 1.25 * length + 1
    assert bucket(top) == top
    assert bucket(length) <= bucket(length + 1)


def test_an_error_is_relative_to_the_largest_number() -> None:
    import torch

    wanted = torch.tensor([4.0, -8.0, float("-inf")])
    assert relative_error(torch.tensor([4.0, -7.0, float("-inf")]), wanted) == 1 / 8
    assert relative_error(torch.tensor([4.0, -8.0, 0.0]), wanted) == float("inf")
    nan = relative_error(torch.tensor([4.0, float("nan"), 1.0]), torch.tensor([4.0, 1.0, 1.0]))
    assert nan != nan
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
