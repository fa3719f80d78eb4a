"""What is known before the first step: lengths from headers, remembered, with a reason for each record left out."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_worlds import dataset, picture, turns, world, write

from mm_finetune.config import DataConfig
from mm_finetune.data import lengths
from mm_finetune.errors import DataError
from mm_finetune.images import ImageReader


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return world(tmp_path / "data")


def test_lengths_are_those_of_the_encoded_records_and_no_pixel_is_read(
    config: DataConfig, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = dataset(config, mini)
    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "read", lambda reader, path: pytest.fail(f"{path} was decoded"))
        index = records.look()
        bare = [records.encode(number, pixels=False) for number in range(len(records))]
    for number in range(len(records)):
        sample = records[number]
        images = sample.images
        assert int(index.tokens[number]) == len(sample.input_ids) == len(bare[number].input_ids)
        assert int(index.loss_tokens[number]) == int((sample.labels[1:] != -100).sum())
        assert int(index.patches[number]) == (len(images.pixel_values) if images else 0)
        if images:
            assert index.media(number).images == tuple(map(tuple, images.image_grid_thw.tolist()))
            assert int(index.largest[number]) == int(images.image_grid_thw.prod(1).max())
    assert index.usable.tolist() == list(range(12))
    assert "12 of 12 records" in index.described()


def test_what_was_found_is_remembered(config: DataConfig, mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataset(config, mini).look()
    examined: list[int] = []
    examine = lengths.examine

    def spied(encoder: Any, samples: Any, numbers: Any) -> Any:
        examined.extend(numbers)
        return examine(encoder, samples, numbers)

    monkeypatch.setattr(lengths, "examine", spied)
    again = dataset(config, mini).look()
    assert examined == []
    for name in lengths.ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    # One picture becomes larger: its record alone is looked at.
    picture(config.path.parent / "5-0.png", (112, 112))
    changed = dataset(config, mini).look()
    assert examined == [5]
    assert changed.media(5).images == ((1, 8, 8),)
    assert int(changed.tokens[5]) == len(dataset(config, mini)[5].input_ids)
    # Other settings, another data set: nothing is taken over.
    examined.clear()
    dataset(replace(config, max_pixels=6272), mini).look()
    config.path.write_text(config.path.read_text() + "\n")
    dataset(config, mini).look()
    assert examined == list(range(12)) * 2


def test_processes_that_begin_together_look_once(
    config: DataConfig, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks belong to an opened file, so that two threads stand for two processes."""
    examined: list[int] = []
    examine, sets = lengths.examine, [dataset(config, mini) for _ in range(3)]

    def spied(encoder: Any, samples: Any, numbers: Any) -> Any:
        examined.extend(numbers)
        return examine(encoder, samples, numbers)

    monkeypatch.setattr(lengths, "examine", spied)
    with ThreadPoolExecutor() as pool:
        first, *others = pool.map(lambda records: records.look(), sets)
    assert examined == list(range(12))
    for other in others:
        np.testing.assert_array_equal(first.tokens, other.tokens)


def test_a_damaged_memory_is_no_harm(config: DataConfig, mini: Path) -> None:
    index = dataset(config, mini).look()
    assert config.cache_dir is not None
    [file] = config.cache_dir.iterdir()
    for content in (b"", b"PK\x03\x04 cut", file.read_bytes()[:-50]):
        file.write_bytes(content)
        np.testing.assert_array_equal(dataset(config, mini).look().tokens, index.tokens)
    (config.cache_dir / "file").touch()
    unwritable = replace(config, cache_dir=config.cache_dir / "file")
    np.testing.assert_array_equal(dataset(unwritable, mini).look().tokens, index.tokens)


def bad_world(folder: Path) -> DataConfig:
    picture(folder / "good.png", (56, 56))
    picture(folder / "thin.png", (4000, 10))
    (folder / "text.png").write_text("no picture")
    asked = "<image>\nWhat?"
    silent = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss": 0}]
    rows: list[tuple[Any, list[str]]] = [
        (turns(asked, "Fine."), ["good.png"]),
        (turns(asked, "x"), ["none.png"]),
        (turns(asked, "x"), ["text.png"]),
        (turns(asked, "x"), ["thin.png"]),
        (turns("no mark", "x"), ["good.png"]),
        (turns("only a question"), []),
        (turns("long", "word " * 600), []),
        (silent, []),
        (turns("Fine?", "Yes."), []),
    ]
    return write(folder, [{"messages": m, "images": i, "videos": []} for m, i in rows])


def test_every_bad_record_has_its_reason(tmp_path: Path, mini: Path) -> None:
    config = bad_world(tmp_path / "data")
    index = dataset(config, mini).look()
    assert [(fault.record, fault.code) for fault in index.faults] == [
        (1, "missing"), (2, "unreadable"), (3, "unreadable"), (4, "conversation"), (5, "conversation"),
        (6, "too_long"), (7, "no_loss"),
    ]  # fmt: skip
    assert index.usable.tolist() == [0, 8]
    with pytest.raises(DataError, match=r"record 2: .*text\.png can't be read.* and 2 more; .* data\.on_bad: skip"):
        dataset(config, mini).check()
    # The memory of it holds the reasons too.
    assert dataset(config, mini).look().faults == index.faults


def test_bad_records_are_skipped_up_to_a_ratio_and_reported(tmp_path: Path, mini: Path) -> None:
    config = replace(bad_world(tmp_path / "data"), on_bad="skip", max_bad_ratio=0.8)
    report = tmp_path / "bad.jsonl"
    dataset(config, mini).check(report=report)
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [row["record"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[5]["code"] == "too_long"
    assert rows[5]["step"] is None
    with pytest.raises(DataError, match=r"7 of 9 records can't be used, more than data\.max_bad_ratio 0\.5"):
        dataset(replace(config, max_bad_ratio=0.5), mini).check()


def test_what_is_no_record_is_a_bad_record(tmp_path: Path, mini: Path) -> None:
    config = world(tmp_path / "data", count=2)
    first, second = map(json.dumps, json.loads(config.path.read_text()))
    config.path.write_text("[" + ",\n".join([first, '{"messages": [}', '{"messages": []}', second]) + "]")
    said = r"record 1: not valid JSON: .*\(line 2\); record 2: 'messages' must be a list.*; .* data\.on_bad: skip"
    with pytest.raises(DataError, match=said):
        dataset(config, mini).check()
    records = dataset(replace(config, on_bad="skip", max_bad_ratio=0.5), mini)
    assert records.check().records == {1, 2}
    assert records.index.usable.tolist() == [0, 3]


def test_a_missing_picture_is_named_with_what_to_do(config: DataConfig, mini: Path) -> None:
    (config.path.parent / "1-0.png").unlink()
    with pytest.raises(DataError, match=r"pictures missing: .*1-0\.png \(record 1\); is data\.dataset_dir right"):
        dataset(config, mini).check()


def test_what_is_too_long_is_shortened_and_counted(tmp_path: Path, mini: Path) -> None:
    picture(tmp_path / "data/a.png", (56, 56))
    long = {"messages": turns("<image> see", "one", "more", "word " * 90), "images": ["a.png"], "videos": []}
    short = {"messages": turns("a", "b"), "images": [], "videos": []}
    hopeless = {"messages": turns("word " * 99, "b"), "images": [], "videos": []}
    config = replace(write(tmp_path / "data", [long, short, hopeless]), seq_length=60, on_bad="skip", max_bad_ratio=1.0)
    words = {}
    for how in ("error", "drop", "drop_turns", "trim_text"):
        records = dataset(replace(config, truncate=how), mini)
        index = records.look()
        words[how] = index.described().split("; ")[1]
        assert index.tokens.max() <= 60
        for number in index.usable.tolist():
            sample = records[number]
            assert len(sample.input_ids) == index.tokens[number]
            if sample.images:
                assert int((sample.input_ids == records.encoder.hf_config.image_token_id).sum()) == 4
    assert words == {
        "error": "0 shortened, 0 left out for their length, 2 bad",
        "drop": "0 shortened, 2 left out for their length, 0 bad",
        "drop_turns": "1 shortened, 0 left out for their length, 1 bad",
        "trim_text": "2 shortened, 0 left out for their length, 0 bad",
    }
