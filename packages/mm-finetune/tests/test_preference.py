"""Losses of pairs, the remembered reference, and runs as a user starts them."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_worlds import preference_world

from mm_finetune.cli import main
from mm_finetune.config import PreferenceConfig, load_config
from mm_finetune.engine.step import Trainer
from mm_finetune.errors import ConfigError
from mm_finetune.preference.losses import Pairs, gradient, preference_loss


def pairs_of(policy: list[list[float]], reference: list[list[float]]) -> Pairs:
    as_tensor = [torch.tensor(values, dtype=torch.float64) for values in (policy, reference)]
    tokens = torch.tensor([[4.0, 2.0]] * len(policy), dtype=torch.float64)
    return Pairs(policy_P2=as_tensor[0], reference_P2=as_tensor[1], tokens_P2=tokens)


# One pair whose margin h is (-10 + 12) - (-9 + 8) = 3; a token, with 4 and 2 of them: 2 / 4 + 1 / 2 = 1.
ONE = pairs_of([[-10.0, -9.0]], [[-12.0, -8.0]])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PreferenceConfig(beta=0.1), math.log(1 + math.exp(-0.3))),
        (
            PreferenceConfig(beta=0.1, label_smoothing=0.25),
            0.75 * math.log(1 + math.exp(-0.3)) + 0.25 * math.log(1 + math.exp(0.3)),
        ),
        (PreferenceConfig(loss="hinge", beta=0.1), 0.7),
        (PreferenceConfig(loss="hinge", beta=0.5), 0.0),
        (PreferenceConfig(loss="ipo", beta=0.1), (1 - 5) ** 2),
        (PreferenceConfig(beta=0.1, sft_weight=2), math.log(1 + math.exp(-0.3)) + 2 * 10 / 4),
    ],
)
def test_losses_are_the_published_ones(config: PreferenceConfig, expected: float) -> None:
    assert preference_loss(ONE, config).item() == pytest.approx(expected, rel=1e-12)


def test_the_slope_of_dpo_is_the_papers() -> None:
    """Equation 7 of arXiv 2305.18290: beta times sigmoid of the reversed margin, up for chosen, down for rejected."""
    _, slopes = gradient(ONE, PreferenceConfig(beta=0.1))
    size = 0.1 / (1 + math.exp(0.3))
    assert slopes.tolist() == [pytest.approx([-size, size], rel=1e-12)]


def test_no_margin_is_too_large() -> None:
    far = pairs_of([[-1e5, -1.0], [-1.0, -1e5]], [[-1.0, -1.0], [-1.0, -1.0]])
    loss, slopes = gradient(far, PreferenceConfig(beta=10))
    assert loss.tolist() == [pytest.approx(10 * (1e5 - 1)), 0.0]
    assert slopes.tolist() == [[-10.0, 10.0], [0.0, 0.0]]


@pytest.fixture
def config(tmp_path: Path, mini: Path) -> Path:
    return preference_world(tmp_path / "world", mini, 8)


def rows(config: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.parent / "run/metrics.jsonl").read_text().splitlines()]


def test_one_word_is_a_section(config: Path) -> None:
    assert load_config(config).preference == PreferenceConfig()
    assert load_config(config, ["preference.beta=0.3"]).preference == PreferenceConfig(beta=0.3)
    assert load_config(config, ["data.packing=true"]).room == 2 * 64
    assert load_config(config, ["data.packing=true", "preference=null"]).room == 64


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("preference.beta=0", "preference.beta is 0.*above 0"),
        ("preference.loss=dpi", "did you mean dpo"),
        ("preference.loss=orpo", "must be dpo or ipo or hinge"),
        ("preference.label_smoothing=0.7", "between 0 and 0.5"),
        ("preference.sft_weight=-1", "preference.sft_weight is -1"),
        ("data.truncate=trim_text", "take error or drop"),
        ("data.train_on_prompt=true", "the answers alone are compared"),
        ("train.loss=sample", "a mean over pairs"),
        ("lora.dropout=0.1", "lora.dropout must be 0"),
        ("data.pack_length=100", "below twice data.seq_length 64"),
    ],
)
def test_what_does_not_go_with_pairs_is_refused(config: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(config, [override])
    if override.startswith("preference.loss"):
        return
    with pytest.raises(ConfigError, match="label_smoothing belongs to the loss dpo, not to ipo"):
        load_config(config, ["preference.loss=ipo", "preference.label_smoothing=0.1"])


# Runs.


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each forward pass for log-probabilities took."""
    taken: list[int] = []
    original = Trainer.log_probabilities

    def spied(trainer: Trainer, batches: Any) -> list[torch.Tensor]:
        taken.append(sum(len(batch.numbers) for batch in batches) // 2)
        return original(trainer, batches)

    monkeypatch.setattr(Trainer, "log_probabilities", spied)
    return taken


def test_a_run_says_what_it_thinks_of_the_answers_and_works_the_reference_out_once(
    config: Path, passes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config)]) == 0
    assert passes == [4, 4, 4, 4], "8 pairs of the reference, then two steps"
    first, second = rows(config)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5), "model and reference are one before the first step"
    assert first["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert second["reward_margin"] != 0
    assert second["reward_margin"] == pytest.approx(second["reward_chosen"] - second["reward_rejected"])
    assert 0 <= second["reward_accuracy"] <= 1
    assert second["logp_chosen"] < 0 > second["logp_rejected"]
    assert "reward margin" in capsys.readouterr().out
    before = rows(config)
    passes.clear()
    assert main(["train", str(config)]) == 0
    assert passes == [4, 4], "the reference was remembered"
    same = ("loss", "reward_chosen", "logp_rejected", "grad_norm")
    assert [[row[name] for name in same] for row in rows(config)] == [[row[name] for name in same] for row in before]


def test_what_the_reference_depends_on_is_part_of_its_name(config: Path, passes: list[int]) -> None:
    from PIL import Image

    assert main(["train", str(config), "train.steps=1"]) == 0
    passes.clear()
    picture = config.parent / "3.png"
    with Image.open(picture) as old:
        changed = old.rotate(90)
    changed.save(picture)
    assert main(["train", str(config), "train.steps=1"]) == 0
    assert passes == [4, 4], "one pair anew, in a step filled up with itself"
    passes.clear()
    assert main(["train", str(config), "train.steps=1", "data.max_pixels=12544", "data.min_pixels=12544"]) == 0
    assert passes == [4, 4, 4], "larger pictures, another reference"
    passes.clear()
    files = sorted((config.parent / "mm").rglob("*.pt"))
    content = torch.load(files[0], weights_only=True)
    content["model"]["text_decoder.decoder.final_layernorm.weight"] *= 1.5
    torch.save(content, files[0])
    assert main(["train", str(config), "train.steps=1"]) == 0
    assert passes == [4, 4, 4], "another model"


def test_a_damaged_memory_is_none(config: Path, passes: list[int]) -> None:
    assert main(["train", str(config), "train.steps=1"]) == 0
    (file,) = (config.parent / "cache").glob("reference-*.npz")
    file.write_bytes(file.read_bytes()[:100])
    passes.clear()
    assert main(["train", str(config), "train.steps=1"]) == 0
    assert passes == [4, 4, 4]
    with np.load(file) as stored:
        assert np.isfinite(stored["values"]).all()


def test_without_a_reference_there_is_no_pass_for_it(config: Path, passes: list[int]) -> None:
    assert main(["train", str(config), "preference.reference_free=true", "preference.loss=hinge"]) == 0
    assert passes == [4, 4]
    assert not list((config.parent / "cache").glob("reference-*"))
    assert rows(config)[0]["reward_chosen"] == pytest.approx(0.1 * rows(config)[0]["logp_chosen"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["loss 0.6931,", "every margin is 0 and the loss of a pair is ln 2 = 0.6931", "reward_margin 0.0000"]),
        (["preference.loss=ipo"], ["loss 25.0000,", "1 / (2 beta)^2 = 25"]),
        (["preference.loss=hinge", "preference.reference_free=true"], ["hinge without a reference: reward_margin "]),
    ],
)
def test_check_tries_the_objective_that_will_be_trained(
    overrides: list[str], words: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(config), *overrides]) == 0
    said = capsys.readouterr().out
    for word in words:
        assert word in said
    assert not list((config.parent / "cache").glob("reference-*"))
    assert main(["train", str(config), "train.steps=1", *overrides]) == 0
    assert f"first batch: loss {rows(config)[0]['loss']:.4f}," in said
    assert f"logp_chosen {rows(config)[0]['logp_chosen']:.4f}" in said


def test_an_adapter_is_measured_by_its_base(config: Path, passes: list[int]) -> None:
    """A new adapter adds nothing, so its reference is the one that a full run has left."""
    assert main(["train", str(config), "train.steps=1"]) == 0
    full = rows(config)
    passes.clear()
    assert main(["train", str(config), "lora.r=4"]) == 0
    assert passes == [4, 4]
    first, second = rows(config)
    assert first["loss"] == pytest.approx(full[0]["loss"], abs=1e-6)
    assert first["logp_chosen"] == pytest.approx(full[0]["logp_chosen"], abs=1e-4)
    assert second["reward_margin"] != 0


def test_a_run_that_goes_on_keeps_its_reference_even_a_forgotten_one(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the model before the first step, not the one that the run goes on from."""
    command = ["train", str(config), "train.steps=4", "output.save_every=2"]
    assert main(command) == 0
    straight = rows(config)
    step, taken = Trainer.step, iter(range(4))

    def interrupted(trainer: Trainer, *given: Any) -> Any:
        if next(taken) == 2:
            raise KeyboardInterrupt
        return step(trainer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        handlers = [signal.getsignal(signal.SIGINT)]
        assert main(command) == 130
        signal.signal(signal.SIGINT, handlers[0])
    assert len(rows(config)) == 2
    for file in (config.parent / "cache").glob("reference-*.npz"):
        file.unlink()
    assert main([*command, "output.resume=true", "output.overwrite=false"]) == 0
    for one, other in zip(straight, rows(config), strict=True):
        for name in ("loss", "reward_chosen", "logp_rejected", "grad_norm"):
            assert one[name] == other[name], (one["step"], name)


def test_packed_or_not_it_is_the_same_run(config: Path) -> None:
    assert main(["train", str(config)]) == 0
    plain = rows(config)
    assert main(["train", str(config), "data.packing=true"]) == 0
    for one, other in zip(plain, rows(config), strict=True):
        for name in ("loss", "reward_chosen", "logp_chosen", "logp_rejected"):
            assert one[name] == pytest.approx(other[name], abs=1e-4), name


def test_a_pair_that_cannot_be_read_counts_for_nothing(config: Path) -> None:
    """Its header is whole, its pixels are not: found when the reference is worked out, borne, and out of the loss."""
    (config.parent / "3.png").write_bytes((config.parent / "3.png").read_bytes()[:60])
    assert main(["train", str(config), "data.on_bad=skip", "data.max_bad_ratio=0.5"]) == 0
    for again in range(2):
        assert math.isfinite(rows(config)[1]["loss"])
        assert rows(config)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), again
        assert main(["train", str(config), "data.on_bad=skip", "data.max_bad_ratio=0.5"]) == 0


@pytest.mark.long
def test_a_mini_model_learns_to_prefer_the_right_digit(tmp_path: Path, mini: Path) -> None:
    """One epoch: whatever a step says of its pairs, it says of digits that were never trained on."""
    config = preference_world(tmp_path / "world", mini, 1200)
    sizes = ["train.epochs=1", "train.steps=0", "train.global_batch_size=16", "train.micro_batch_size=16"]
    assert main(["train", str(config), *sizes, "preference.beta=0.5"]) == 0
    right = [row["reward_accuracy"] for row in rows(config)]
    assert len(right) == 75
    assert sum(right[:10]) / 10 < 0.7
    assert sum(right[-15:]) / 15 > 0.9
