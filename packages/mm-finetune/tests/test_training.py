"""The command as a user types it: a run that works, and faults told in one line before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mm_convert import Converter, Layout, MegatronFolder
from mm_datafmt import convert
from mm_finetune.cli import main
from mm_finetune.mini import make

QWEN = Converter.named("Qwen2_5_VLConverter")
ONE_PROCESS = "parallel.pp_size=1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data and two converted checkpoints, made once."""
    folder = make(tmp_path_factory.mktemp("mini") / "demo", digits=60, heldout_digits=10)
    convert(folder / "data/train.llava.json", folder / "data/train.json", image_dir=folder / "data/images")
    for name, llm, vit in (("mm", [[2, 2]], [[4, 0]]), ("mm-one", [[4]], [[4]])):
        QWEN.hf_to_mm(folder / "hf", folder / name, Layout(llm_pp_layers=llm, vit_pp_layers=vit))  # type: ignore[arg-type]
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "world"))


def arguments(world: Path, *overrides: str) -> list[str]:
    small = ["train.steps=3", "train.global_batch_size=4", "train.micro_batch_size=2", "data.max_samples=8"]
    return ["train", str(world / "train.yaml"), *small, *overrides]


def one_process(world: Path, *overrides: str) -> list[str]:
    return arguments(world, ONE_PROCESS, f"model.load={world}/mm-one", *overrides)


def test_a_run_leaves_metrics_settings_and_a_checkpoint_that_converts_back(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(one_process(world)) == 0
    run = world / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["loss"] < rows[0]["loss"], "three steps on eight records lower the loss"
    assert (run / "checkpoint/latest_checkpointed_iteration.txt").read_text() == "3"
    assert "steps: 3" in (run / "config.yaml").read_text()
    assert MegatronFolder.open(run / "checkpoint").layout == MegatronFolder.open(world / "mm-one").layout
    QWEN.mm_to_hf(run / "checkpoint", world / "hf", world / "tuned")
    assert "checkpoint: " in capsys.readouterr().out
    assert main(one_process(world)) == 2, "a finished run is kept"
    assert "holds a run with a checkpoint" in capsys.readouterr().err
    (run / "notes.txt").write_text("mine")
    assert main(one_process(world, "output.overwrite=true", "train.steps=2")) == 0
    assert (run / "notes.txt").exists(), "only what a run writes is replaced"
    assert [path.name for path in (run / "checkpoint").iterdir() if path.is_dir()] == ["iter_0000002"]


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(world: Path) -> None:
    losses = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        assert main(one_process(world, f"train.seed={seed}", f"output.dir={world}/{name}")) == 0
        losses.append([json.loads(row)["loss"] for row in (world / name / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def drop_picture(world: Path) -> None:
    first = json.loads((world / "data/train.json").read_text())[0]["images"][0]
    (world / "data" / first).unlink()


def break_picture(world: Path) -> None:
    for record in json.loads((world / "data/train.json").read_text())[:8]:
        (world / "data" / record["images"][0]).write_bytes(b"no picture")


def another_model(world: Path) -> None:
    config = json.loads((world / "hf/config.json").read_text())
    (world / "hf/config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl"}))


@pytest.mark.parametrize(
    ("damage", "overrides", "words"),
    [
        (None, ["train.setps=3"], ["unknown key train.setps", "did you mean train.steps?"]),
        (None, ["parallel.tp_size=2"], ["started with 1 process(es)", "multiple of 2"]),
        (None, ["train.global_batch_size=3"], ["global_batch_size 3", "micro_batch_size 2"]),
        (None, ["model.hf_dir=nowhere"], ["nowhere is no Hugging Face folder"]),
        (None, ["model.load=nowhere"], ["nowhere is no Megatron checkpoint"]),
        (lambda w: (w / "mm-one/latest_checkpointed_iteration.txt").unlink(), [], ["no Megatron checkpoint"]),
        (None, ["model.load=mm"], ["cut for tp_size 1 and pp_size 2", "parallel.pp_size=2"]),
        (None, ["data.path=nowhere.json"], ["nowhere.json"]),
        (None, ["data.path=train.yaml"], ["make the file with mm-datafmt convert"]),
        (None, ["data.seq_length=20"], ["tokens, data.seq_length is 20"]),
        (drop_picture, [], ["pictures missing", "(record 0)", "data.dataset_dir"]),
        (break_picture, [], ["can't be read"]),
        (another_model, [], ["'qwen3_vl'", "trained here are qwen2_5_vl, qwen2_vl"]),
    ],
)  # fmt: skip
def test_faults_are_one_line_and_leave_nothing(
    damage: Callable[[Path], object] | None,
    overrides: list[str],
    words: list[str],
    world: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if damage:
        damage(world)
    assert main(one_process(world, *overrides)) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert message.count("mm-finetune: error: ") == 1
    assert "Traceback" not in message
    assert not (world / "run/checkpoint").exists()


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_folder_of_somebody_else_is_kept(overwrite: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "run").mkdir()
    (world / "run/mine").write_text("kept")
    assert main(one_process(world, f"output.overwrite={overwrite}")) == 2
    assert "is there and is no folder of a run" in capsys.readouterr().err
    assert [path.name for path in (world / "run").iterdir()] == ["mine"]


def test_layouts_that_are_not_trained(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for llm, vit, words in (
        ([[1, 1], [1, 1]], [[4, 0], [0, 0]], "virtual stages"),
        ([[2, 2]], [[2, 2]], "must begin on the last stage with vision layers"),
        ([[4, 0]], [[4, 0]], "a stage without language layers"),
    ):
        layout = Layout(llm_pp_layers=llm, vit_pp_layers=vit)  # type: ignore[arg-type]
        QWEN.hf_to_mm(world / "hf", world / "odd", layout, overwrite=True)
        os.environ["WORLD_SIZE"] = "2"
        try:
            assert main(arguments(world, f"model.load={world}/odd")) == 2
        finally:
            del os.environ["WORLD_SIZE"]
        assert words in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_ends_at_once_and_the_run_can_be_started_again(world: Path) -> None:
    # A shell that starts the tests in the background has its children ignore the signal.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from mm_finetune.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *one_process(world, "train.steps=100000")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step ")
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    last = message.splitlines()[-1]
    begin = f"mm-finetune: interrupted; no checkpoint is in {world}/run: the same line starts anew, step"
    assert last.startswith(begin)
    assert last.endswith(" to be done again; output.save_every=100 saves on the way")
    assert "Traceback" not in message
    assert not (world / "run/checkpoint").exists()
    assert main(one_process(world)) == 0, "what an interrupted run left is no obstacle"


@pytest.mark.long
def test_two_processes_as_in_the_demo_and_one_too_many(world: Path) -> None:
    """Two pipeline stages train; three processes are refused by rank 0 alone."""

    def launch(processes: int) -> subprocess.CompletedProcess[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*torchrun, "-m", "mm_finetune", *arguments(world)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    refused = launch(3)
    assert refused.returncode == 1, "torchrun's own code"
    assert "exitcode  : 2" in refused.stderr
    assert refused.stderr.count("mm-finetune: error: started with 3 process(es)") == 1
    assert not (world / "run").exists()
    done = launch(2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 3/3") == 1, "rank 0 alone speaks"
    saved = world / "run/checkpoint/iter_0000003"
    assert sorted(p.name for p in saved.iterdir()) == ["mp_rank_00_000", "mp_rank_00_001", "state"]
    before = torch.load(world / "mm/release/mp_rank_00_001/model_optim_rng.pt", weights_only=True)["model"]
    after = torch.load(saved / "mp_rank_00_001/model_optim_rng.pt", weights_only=True)["model"]
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[n], after[n]) for n in before), "every tensor was trained"


def test_a_loss_that_is_no_number_ends_the_run_before_the_weights_are_touched(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of 1e30 breaks the weights in the first step; the second has no loss."""
    assert main(one_process(world, "train.lr=1e30", "train.warmup_fraction=0")) == 2
    message = capsys.readouterr().err
    assert "loss is no number" in message
    assert "train.on_nan=skip" in message
    (row,) = [json.loads(line) for line in (world / "run/anomalies.jsonl").read_text().splitlines()]
    assert (row["step"], row["loss"], len(row["samples"])) == (2, None, 4)
    assert not (world / "run/checkpoint").exists()


def test_a_step_that_is_refused_changes_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_finetune.watching.Guard.decide", lambda self, loss, norm: False)
    assert main(one_process(world)) == 0
    before, after = (
        torch.load(world / folder / "mp_rank_00/model_optim_rng.pt", weights_only=True)["model"]
        for folder in ("mm-one/release", "run/checkpoint/iter_0000003")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_frozen_keeps_its_bytes_and_the_rest_is_trained(world: Path) -> None:
    assert main(one_process(world, "train.freeze=[visual.*, model.embed_tokens.*]", "train.steps=2")) == 0
    before, after = (
        torch.load(world / folder / "mp_rank_00/model_optim_rng.pt", weights_only=True)["model"]
        for folder in ("mm-one/release", "run/checkpoint/iter_0000002")
    )
    still = {name for name in before if torch.equal(before[name], after[name])}
    frozen = ("image_encoder.", "text_decoder.embedding.")
    assert still == {name for name in before if name.startswith(frozen)}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.freeze=[vizual.*]", "pattern 'vizual.*' matches no weight; did you mean visual"),
        ("train.freeze=['*.q_proj.*']", "is one weight here, its parts can't train at different rates"),
        ("train.lr_scale.*up_proj*=0.5", "is one weight here, its parts can't train at different rates"),
        ("lora.target_modules=[q_porj]", "lora.target_modules: 'q_porj' matches no linear layer"),
        ("lora.load=nowhere", "nowhere is no PEFT adapter"),
    ],
)
def test_patterns_are_checked_before_the_first_step(
    override: str, words: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(one_process(world, override)) == 2
    assert words in capsys.readouterr().err
    assert not (world / "run").exists()


def test_checkpoints_during_a_run_and_the_newest_of_them(world: Path) -> None:
    assert main(one_process(world, "train.steps=5", "output.save_every=2", "output.keep_last=2")) == 0
    folder = world / "run/checkpoint"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["iter_0000004", "iter_0000005"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert main(one_process(world, "train.steps=4", f"output.dir={world}/short")) == 0
    early, whole = (
        torch.load(path / "mp_rank_00/model_optim_rng.pt", weights_only=True)["model"]
        for path in (folder / "iter_0000004", world / "short/checkpoint/iter_0000004")
    )
    assert early.keys() == whole.keys()
    assert not all(torch.equal(early[n], whole[n]) for n in early), "another length is another learning rate"
