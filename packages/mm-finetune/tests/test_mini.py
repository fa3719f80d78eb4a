"""The mini model and data set: loadable by everybody, real, split cleanly, the same again."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_datafmt import check, convert, read
from mm_finetune.cli import main
from mm_finetune.config import load_config
from mm_finetune.errors import ConfigError, OutputExistsError
from mm_finetune.images import ImageReader
from mm_finetune.mini import data, make
from mm_finetune.mini import model as mini_model
from mm_finetune.mini.tokenizer import SPECIAL_TOKENS, train_tokenizer
from mm_finetune.template import encode

PARTS = ("train", "heldout")


def records(mini: Path, part: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((mini / f"data/{part}.llava.json").read_text())
    return loaded


def question(record: dict[str, Any]) -> str:
    return str(record["conversations"][0]["value"]).removeprefix("<image>\n")


def answer(record: dict[str, Any]) -> str:
    return str(record["conversations"][1]["value"])


def test_transformers_loads_the_folder_whole(mini: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(mini / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id
    assert not model.generation_config.do_sample
    assert (mini / "hf/model.safetensors").stat().st_size < 10 * 2**20


def test_the_configuration_has_every_kind_of_block_and_the_ids_of_its_tokenizer(mini: Path, tokenizer: Any) -> None:
    config = json.loads((mini / "hf/config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert text["num_key_value_heads"] == 2 < text["num_attention_heads"]
    assert not config["tie_word_embeddings"]
    head = text["hidden_size"] // text["num_attention_heads"]
    assert sum(text["rope_parameters"]["mrope_section"]) * 2 == head
    assert 0 < len(vision["fullatt_block_indexes"]) < vision["depth"]
    assert vision["out_hidden_size"] == text["hidden_size"]
    assert (text["rms_norm_eps"], vision["tokens_per_second"]) == (1e-6, 2)
    assert text["vocab_size"] % 64 == 0
    assert len(tokenizer) <= text["vocab_size"]
    ids = {
        "<|image_pad|>": config["image_token_id"], "<|video_pad|>": config["video_token_id"],
        "<|vision_start|>": config["vision_start_token_id"], "<|vision_end|>": config["vision_end_token_id"],
        "<|im_end|>": text["eos_token_id"], "<|endoftext|>": text["pad_token_id"],
    }  # fmt: skip
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_the_tokenizer_is_a_real_one(tokenizer: Any) -> None:
    assert all(len(tokenizer(token)["input_ids"]) == 1 for token in SPECIAL_TOKENS)
    assert len(tokenizer("2024")["input_ids"]) == 4, "digits stand alone, as in Qwen's"
    prose = data.prose()[0]
    assert len(tokenizer(prose)["input_ids"]) < 0.6 * len(prose), "words are learnt, not only bytes"
    for subject in data.PHOTOGRAPHS.values():
        assert len(tokenizer(subject)["input_ids"]) <= 3


def test_an_image_part_of_a_chat_becomes_one_placeholder(tokenizer: Any) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "?"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n" in text


@pytest.mark.parametrize("part", PARTS)
def test_mm_datafmt_finds_no_fault(mini: Path, tmp_path: Path, part: str) -> None:
    source, target = mini / f"data/{part}.llava.json", tmp_path / f"{part}.json"
    assert convert(source, target, image_dir=mini / "data/images", dataset_dir=mini / "data").ok
    report = check(target, dataset_dir=mini / "data")
    assert report.ok, report.describe()


def test_the_configuration_for_training_is_valid_and_every_record_fits(mini: Path, tokenizer: Any) -> None:
    config = load_config(mini / "train.yaml")
    assert config.model.hf_dir == mini / "hf"
    assert config.data.path == mini / "data/train.json"
    reader, lengths = ImageReader(mini / "hf"), []
    for sample in list(read(mini / "data/train.llava.json"))[:60]:
        images = reader([mini / "data/images" / path for path in sample.images])
        ids = encode(sample.messages, tokenizer=tokenizer, image_token_counts=images.token_counts).input_ids
        lengths.append(len(ids))
    assert max(lengths) <= config.data.seq_length


def test_digits_are_those_of_scikit_learn(mini: Path) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    found = [record for part in PARTS for record in records(mini, part) if question(record) == data.DIGIT_QUESTION]
    assert len(found) == 60
    for record in found:
        index = int(record["id"].removeprefix("digits/"))
        assert answer(record) == str(bunch.target[index])
        with Image.open(mini / "data/images" / record["image"]) as picture:
            assert picture.size == (56, 56)
            small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), bunch.images[index].ravel())[0, 1] > 0.95


def test_photographs_are_files_of_the_installed_package() -> None:
    folder = resources.files("skimage.data")
    assert [name for name in data.PHOTOGRAPHS if not (folder / name).is_file()] == []


def test_answers_about_photographs_can_be_checked(mini: Path) -> None:
    tones: dict[str, int] = {}
    for record in (record for part in PARTS for record in records(mini, part)):
        if question(record) == data.PHOTOGRAPH_QUESTION:
            assert record["id"].startswith(f"photographs/{answer(record)}-")
        if question(record) == data.COLOUR_QUESTION:
            with Image.open(mini / "data/images" / record["image"]) as picture:
                pixels = np.asarray(picture.convert("RGB"), dtype=int)
            assert answer(record) == ("yes" if np.ptp(pixels, axis=2).any() else "no")
            tones[answer(record)] = tones.get(answer(record), 0) + 1
    assert min(tones["yes"], tones["no"]) > 0.2 * sum(tones.values())


def test_nothing_that_is_held_out_is_trained_on(mini: Path) -> None:
    held, trained = records(mini, "heldout"), records(mini, "train")
    assert not {record["id"] for record in held} & {record["id"] for record in trained}
    digests = [
        {hashlib.sha256((mini / "data/images" / record["image"]).read_bytes()).digest() for record in part}
        for part in (held, trained)
    ]
    assert not digests[0] & digests[1]
    # By photograph: the numbers of the tiles.
    tiles = [{"-".join(r["id"].split("-")[:2]) for r in part if r["id"].startswith("ph")} for part in (held, trained)]
    assert not tiles[0] & tiles[1]
    assert {name.split("-")[0] for name in tiles[0]} == {name.split("-")[0] for name in tiles[1]}


def test_tiles_share_no_pixel() -> None:
    import random

    # Each pixel of this picture has a colour of its own.
    y, x = np.mgrid[0:120, 0:200]
    unique = np.stack([y, x, (x * 7 + y * 13) % 256], axis=-1).astype(np.uint8)
    seen = [
        {tuple(pixel) for pixel in np.asarray(tile).reshape(-1, 3).tolist()}
        for tile in data.tiles(Image.fromarray(unique))
    ]
    assert len(seen) == 60
    assert sum(map(len, seen)) == len(set.union(*seen))
    tile = next(data.tiles(Image.fromarray(unique)))
    part = np.asarray(data.part_of(tile, random.Random(1))).reshape(-1, 3).tolist()
    assert {tuple(pixel) for pixel in part} <= seen[0]


def test_the_default_split_holds_out_300_digits() -> None:
    split = data.digits(seed=0, train=None, heldout=300)
    assert (len(split.heldout), len(split.train)) == (300, 1497)
    assert {example.answer for example in split.heldout} == set("0123456789")


def test_a_seed_gives_the_same_again_and_another_gives_another(tmp_path: Path) -> None:
    def names(seed: int) -> list[str]:
        return [example.name for example in data.digits(seed=seed, train=30, heldout=10).train]

    def pixels(seed: int) -> list[bytes]:
        return [example.picture.tobytes() for example in data.photographs(seed=seed).train[:50]]

    assert names(1) == names(1) != names(2)
    assert pixels(1) == pixels(1) != pixels(2)
    tokenizers = [train_tokenizer(data.prose()) for _ in range(2)]
    assert tokenizers[0].backend_tokenizer.to_str() == tokenizers[1].backend_tokenizer.to_str()
    state = torch.get_rng_state()
    weights = []
    for number, seed in enumerate((3, 3, 4)):
        mini_model.save_model(tmp_path / str(number), tokenizers[0], seed=seed)
        weights.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers go on"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command with few photographs: for what happens around it."""
    monkeypatch.setattr(data, "PHOTOGRAPHS", {"moon.png": "moon"})


@pytest.mark.usefixtures("small")
def test_only_an_empty_folder_or_one_of_ours_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "demo"
    target.mkdir()
    small = ["--digits", "5", "--heldout_digits", "5"]
    assert main(["mini", str(target), *small]) == 0
    assert "train.yaml" in capsys.readouterr().out
    (target / "run").mkdir()
    assert main(["mini", str(target), *small]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert (target / "run").exists()
    assert main(["mini", str(target), *small, "--overwrite"]) == 0
    assert not (target / "run").exists()
    foreign = tmp_path / "letters"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(OutputExistsError, match="was not made by this command"):
        make(foreign, overwrite=True)
    with pytest.raises(OutputExistsError, match=r"letter\.txt is a file"):
        make(foreign / "letter.txt", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "letters"]


@pytest.mark.usefixtures("small")
def test_an_interruption_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "demo", digits=5, heldout_digits=5)
    before = (target / "data/train.llava.json").read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mini_model, "save_model", interrupted)
    for folder, overwrite in ((target, True), (tmp_path / "new", False)):
        with pytest.raises(KeyboardInterrupt):
            make(folder, seed=1, digits=5, heldout_digits=5, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert (target / "data/train.llava.json").read_bytes() == before


@pytest.mark.parametrize(("train", "heldout"), [(0, 10), (10, 0), (1700, 100), (None, 1797), (-1, 5)])
def test_numbers_of_digits_that_cannot_be_are_refused(tmp_path: Path, train: int | None, heldout: int) -> None:
    with pytest.raises(ConfigError, match="not above 1797"):
        make(tmp_path / "demo", digits=train, heldout_digits=heldout)
    assert not any(tmp_path.iterdir())


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"sklearn.* is not installed: pip install 'mm-finetune\[demo\]'"):
        make(tmp_path / "demo")
