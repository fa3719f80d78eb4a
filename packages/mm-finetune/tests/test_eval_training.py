"""Evaluation in a run from the command line: it is written, shown, and changes nothing."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from mm_convert import Converter, Layout
from mm_datafmt import convert
from mm_finetune.cli import main
from mm_finetune.evaluation import Evaluation
from mm_finetune.mini import make

QWEN = Converter.named("Qwen2_5_VLConverter")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("mini") / "demo", digits=30, heldout_digits=10)
    for name in ("train", "heldout"):
        convert(folder / f"data/{name}.llava.json", folder / f"data/{name}.json", image_dir=folder / "data/images")
    QWEN.hf_to_mm(folder / "hf", folder / "mm-one", Layout(llm_pp_layers=[[4]], vit_pp_layers=[[4]]))  # type: ignore[arg-type]
    return folder


def arguments(world: Path, name: str, *overrides: str) -> list[str]:
    small = ["train.steps=4", "train.global_batch_size=4", "train.micro_batch_size=2", "data.max_samples=8"]
    where = ["parallel.pp_size=1", f"model.load={world}/mm-one", f"output.dir={world}/{name}"]
    return ["train", str(world / "train.yaml"), *small, *where, *overrides]


def evaluation(world: Path) -> list[str]:
    return [
        "train.eval_every=3", f"data.eval_path={world}/data/heldout.json", "data.eval_samples=12",
        "train.eval_max_new_tokens=3",
    ]  # fmt: skip


def test_a_run_is_bit_for_bit_the_same_with_and_without_evaluations(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(world, "without", "lora={r: 2, dropout: 0.2}")) == 0
    capsys.readouterr()
    assert main(arguments(world, "with", "lora={r: 2, dropout: 0.2}", *evaluation(world))) == 0
    printed = capsys.readouterr().out
    assert printed.count("held out: exact") == 2
    rows = [
        [json.loads(row) for row in (world / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("without", "with")
    ]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4], "a line a step, no others"
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]
    found = Evaluation.load(world / "with/evals/step_0000003.json")
    assert len(found.answers) == 12
    assert found.loss is not None
    assert f"exact {found.accuracy:.1%}  loss {found.loss:.4f}  12 records" in printed
    assert (world / "with/evals/step_0000004.json").is_file(), "one more after the last step"
    assert found.dataset_dir.resolve() == (world / "data").resolve()


def test_the_report_shows_what_the_model_said_over_time(world: Path) -> None:
    if not (world / "shown").exists():
        assert main(arguments(world, "shown", "train.eval_every=2", *evaluation(world)[1:])) == 0
    assert main(["report", str(world / "shown"), "--overwrite"]) == 0
    text = (world / "shown/report.html").read_text()
    assert "Share of right answers by step" in text
    assert "Loss of the right answers by step" in text
    assert text.count("<dt>step 2</dt>") == text.count("<dt>step 4</dt>") == 12
    first, last = (Evaluation.load(world / f"shown/evals/step_000000{step}.json") for step in (2, 4))
    assert first.loss is not None
    assert last.loss is not None
    assert last.loss < first.loss, "it learns"


@pytest.mark.long
def test_weights_are_the_same_with_and_without_evaluations(world: Path) -> None:
    assert main(arguments(world, "plain", "train.steps=2")) == 0
    assert main(arguments(world, "asked", "train.steps=2", "train.eval_every=1", *evaluation(world)[1:])) == 0
    before, after = (
        torch.load(world / name / "checkpoint/iter_0000002/mp_rank_00/model_optim_rng.pt", weights_only=True)["model"]
        for name in ("plain", "asked")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_disk_that_is_full_does_not_end_the_run(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Evaluation, "save", full)
    assert main(arguments(world, "full", "train.steps=1", *evaluation(world))) == 0
    assert "NOT WRITTEN" in capsys.readouterr().out


def test_faults_are_told_before_the_first_step(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, words in (
        (["train.eval_every=1"], "train.eval_every needs data.eval_path"),
        (["train.eval_every=1", "data.eval_path=none.json"], "none.json"),
        (["train.eval_every=1", f"data.eval_path={world}/data/empty.json"], "no record of"),
    ):
        (world / "data/empty.json").write_text('[{"messages": [{"role": "user", "content": "?"}], "images": []}]')
        assert main(arguments(world, "faulty", *overrides)) == 2
        assert words in capsys.readouterr().err
        assert not (world / "faulty").exists()


def test_held_out_records_that_cannot_be_asked_are_left_out(world: Path) -> None:
    records = json.loads((world / "data/heldout.json").read_text())[:6]
    (world / "data/images").joinpath("cut.png").write_bytes(
        (world / "data" / records[0]["images"][0]).read_bytes()[:-200]
    )
    records[2]["images"] = ["images/cut.png"]
    (world / "data/held.json").write_text(json.dumps(records))
    assert main(arguments(world, "left", *evaluation(world), f"data.eval_path={world}/data/held.json")) == 0
    found = Evaluation.load(world / "left/evals/step_0000004.json")
    assert len(found.answers) == 5
    assert [failure.number for failure in found.failures] == [3]
    assert "cut.png" in found.failures[0].reason
