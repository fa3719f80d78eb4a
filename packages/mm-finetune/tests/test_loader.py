"""Steps as a process gets them: the same samples whatever the layout, and in step when one can't be read."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_worlds import dataset, picture, world

from mm_finetune.config import DataConfig
from mm_finetune.data import Alone, Batch, Dataset, Fault, Layout, Loader, LoaderSettings, StepData
from mm_finetune.errors import DataError
from mm_finetune.images import ImageReader

GLOBAL_BATCH = 8


class Told(Alone):
    """A process that is told of faults which others found."""

    def __init__(self, others: Sequence[Fault] = (), pixels: str = "read") -> None:
        self.others, self.pixels = others, pixels  # type: ignore[assignment]
        self.said: list[Fault] = []

    def union(self, faults: Sequence[Fault]) -> list[Fault]:
        self.said += faults
        return [*faults, *self.others]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Read only."""
    return world(tmp_path_factory.mktemp("loader") / "data", count=20)


def settings(layout: Layout, rank: int = 0) -> LoaderSettings:
    return LoaderSettings(global_batch_size=GLOBAL_BATCH, seed=5, last_step=4, layout=layout, rank=rank)


def steps(records: Dataset, layout: Layout, rank: int = 0, exchange: Alone | None = None) -> list[StepData]:
    with closing(Loader(records, settings(layout, rank), exchange=exchange)) as loader:
        return [loader.step(step) for step in range(1, 5)]


def numbers(data: StepData) -> list[int]:
    return [number for batch in data.batches for number in batch.numbers]


LAYOUTS = [
    Layout(),
    Layout(micro_batch_size=4),
    Layout(ranks=2, micro_batch_size=2),
    Layout(room=512),
    Layout(ranks=3, room=600),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_made_of_the_same_samples_in_every_layout(config: DataConfig, mini: Path, layout: Layout) -> None:
    records = dataset(config, mini)
    ranks = [steps(records, layout, rank) for rank in range(layout.ranks)]
    for step in range(4):
        dealt = [number for rank in ranks for number in numbers(rank[step])]
        assert sorted(dealt) == sorted(ranks[0][step].numbers)
        assert len({rank[step].numbers for rank in ranks}) == 1
    # 8 samples a step of 20 records: the third step begins the second epoch after 4.
    order = [number for step in ranks[0] for number in step.numbers]
    assert sorted(order[:20]) == list(range(20))


def same(one: Batch, other: Batch) -> bool:
    pairs = [(value, getattr(other, name)) for name, value in vars(one).items()]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_and_memory_change_nothing(config: DataConfig, mini: Path, workers: int) -> None:
    plain = steps(dataset(replace(config, workers=0, cache_mib=0), mini), Layout(micro_batch_size=2))
    ahead = replace(config, workers=workers, prefetch_mib=0 if workers == 4 else 64)
    for one, other in zip(plain, steps(dataset(ahead, mini), Layout(micro_batch_size=2)), strict=True):
        assert len(one.batches) == len(other.batches) == 4
        assert all(map(same, one.batches, other.batches))
        assert one.wait_seconds > 0


def test_a_run_may_begin_at_any_step(config: DataConfig, mini: Path) -> None:
    records = dataset(config, mini)
    straight = steps(records, Layout(micro_batch_size=2))
    with closing(Loader(records, settings(Layout(micro_batch_size=2)))) as loader:
        for step in (3, 4, 2):
            assert all(map(same, loader.step(step).batches, straight[step - 1].batches))


def test_each_picture_is_decoded_once_and_only_where_it_is_needed(
    config: DataConfig, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    read = ImageReader.read

    def spied(reader: ImageReader, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        decoded.append(path)
        return read(reader, path)

    monkeypatch.setattr(ImageReader, "read", spied)
    for pixels in ("none", "receive"):
        without = steps(dataset(config, mini), Layout(micro_batch_size=2), exchange=Told(pixels=pixels))
        assert decoded == []
        assert all(batch.pixel_values is None for data in without for batch in data.batches)
    # One thread: two could both begin a record that two steps in a row hold.
    read_too = steps(dataset(replace(config, workers=1), mini), Layout(micro_batch_size=2))
    assert len(decoded) == len(set(decoded)), "32 samples of 20 records: what was read is kept"
    for one, other in zip(without, read_too, strict=True):
        assert all(
            same(replace(a, pixel_values=None), replace(b, pixel_values=None))
            for a, b in zip(one.batches, other.batches, strict=True)
        )


def damaged(mini: Path, folder: Path, **settings: object) -> tuple[Dataset, list[Path]]:
    """A data set whose record 2 loses a picture, and whose record 3 gets another one, after they were looked at."""
    config = replace(world(folder, count=12), **settings)  # type: ignore[arg-type]
    records = dataset(config, mini)
    records.look()
    (folder / "2-1.png").unlink()
    picture(folder / "3-0.png", (400, 30))
    return records, [folder / "2-1.png", folder / "3-0.png"]


def loss_by_number(batches: Sequence[Batch]) -> dict[int, float]:
    return {number: float(batch.loss_mask[row].sum()) for batch in batches for row, number in enumerate(batch.numbers)}


def test_a_file_that_vanishes_keeps_its_place_without_loss_on_every_process(tmp_path: Path, mini: Path) -> None:
    records, _ = damaged(mini, tmp_path / "data", on_bad="skip", max_bad_ratio=0.5)
    report = tmp_path / "bad.jsonl"
    whole = dataset(world(tmp_path / "whole", count=12), mini)
    layout = replace(settings(Layout(micro_batch_size=2)), last_step=3)
    reader, listener = Told(), Told(pixels="none")
    with (
        closing(Loader(records, layout, exchange=reader, bad=records.check(report=report))) as reading,
        closing(Loader(records, layout, exchange=listener)) as listening,
        closing(Loader(whole, layout)) as sound,
    ):
        seen: set[int] = set()
        for step in (1, 2, 3):
            data, expected = reading.step(step), sound.step(step)
            listener.others = reader.said
            heard = listening.step(step)
            assert data.bad == heard.bad == tuple(sorted({2, 3} & set(data.numbers)))
            seen.update(data.bad)
            for got, told, was in zip(data.batches, heard.batches, expected.batches, strict=True):
                assert torch.equal(got.input_ids, was.input_ids), "nothing else moves"
                assert torch.equal(got.loss_mask, told.loss_mask)
                assert got.pixel_values is None or was.pixel_values is None or (
                    got.pixel_values.shape == was.pixel_values.shape
                )  # fmt: skip
            losses, usual = loss_by_number(data.batches), loss_by_number(expected.batches)
            assert losses == {number: 0.0 if number in {2, 3} else loss for number, loss in usual.items()}
    assert seen == {2, 3}
    rows = {row["record"]: row for row in map(json.loads, report.read_text().splitlines())}
    assert rows[2]["code"] == "unreadable"
    assert "2-1.png does not exist" in rows[2]["message"]
    assert rows[3]["code"] == "changed"
    assert rows[2]["step"] in (1, 2)


def test_without_the_policy_every_process_stops_at_the_same_step(tmp_path: Path, mini: Path) -> None:
    records, _ = damaged(mini, tmp_path / "data")
    reader, listener = Told(), Told(pixels="none")
    layout = settings(Layout(micro_batch_size=2))
    stopped = []
    with (
        closing(Loader(records, layout, exchange=reader)) as reading,
        closing(Loader(records, layout, exchange=listener)) as listening,
    ):
        for step in range(1, 4):
            outcome = []
            for loader in (reading, listening):
                listener.others = reader.said
                try:
                    loader.step(step)
                except DataError as error:
                    outcome.append(str(error))
            if outcome:
                stopped = outcome
                break
    assert len(stopped) == 2
    assert stopped[0] == stopped[1]
    assert "data.on_bad: skip" in stopped[0]


def test_too_many_end_the_run(tmp_path: Path, mini: Path) -> None:
    records, _ = damaged(mini, tmp_path / "data", on_bad="skip", max_bad_ratio=0.1)
    with pytest.raises(DataError, match=r"2 of 12 records can't be used, more than data\.max_bad_ratio 0\.1"):
        steps(records, Layout(micro_batch_size=2))


def test_a_picture_that_hangs_the_decoder_is_given_up(
    tmp_path: Path, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(world(tmp_path / "data", count=12), on_bad="skip", max_bad_ratio=0.5, decode_timeout_s=0.3)
    never, read = threading.Event(), ImageReader.read

    def hanging(reader: ImageReader, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        if path.name == "6-0.png":
            never.wait()
        return read(reader, path)

    monkeypatch.setattr(ImageReader, "read", hanging)
    records = dataset(config, mini)
    report = tmp_path / "bad.jsonl"
    with closing(Loader(records, settings(Layout(micro_batch_size=2)), bad=records.check(report=report))) as loader:
        bad = {number for step in range(1, 4) for number in loader.step(step).bad}
    never.set()
    assert bad == {6}
    [row] = map(json.loads, report.read_text().splitlines())
    assert (row["record"], row["code"]) == (6, "hangs")


def test_a_step_of_nothing_is_refused(tmp_path: Path, mini: Path) -> None:
    config = replace(world(tmp_path / "data", count=12), on_bad="skip", max_bad_ratio=1.0)
    records = dataset(config, mini)
    records.look()
    for path in (tmp_path / "data").glob("*.png"):
        path.unlink()
    text_only = {0, 4, 8}
    layout = replace(settings(Layout()), global_batch_size=1, last_step=12)
    with closing(Loader(records, layout)) as loader:
        for step in range(1, 13):
            if {*loader._numbers(step)} <= text_only:
                assert loader.step(step).bad == ()
            else:
                with pytest.raises(DataError, match=f"no record of step {step} can be read"):
                    loader.step(step)
