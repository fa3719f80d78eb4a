"""One process: ended in every way, told what can't be gone on from, and checkpoints that can't be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import TRACKER, differing, go_back, numbers, rows, steps, tensors

from mm_convert import Converter, Layout
from mm_datafmt import convert
from mm_finetune.checkpointing import files
from mm_finetune.cli import main
from mm_finetune.engine.step import Trainer
from mm_finetune.evaluation import Evaluation
from mm_finetune.evaluation.during import Evaluator
from mm_finetune.mini import make

SMALL = [
    "train.steps=6", "train.global_batch_size=4", "train.micro_batch_size=2", "data.max_samples=20",
    "output.save_every=2", "parallel.pp_size=1", "model.load=one", "output.log_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and a run of six steps in ``straight``."""
    folder = make(tmp_path_factory.mktemp("mini") / "world", digits=40, heldout_digits=10)
    convert(folder / "data/train.llava.json", folder / "data/train.json", image_dir=folder / "data/images")
    for name, layout in (
        ("one", Layout(llm_pp_layers=((4,),), vit_pp_layers=((4,),))),
        ("two", Layout(llm_pp_layers=((2, 2),), vit_pp_layers=((4, 0),))),
    ):
        Converter.named("Qwen2_5_VLConverter").hf_to_mm(folder / "hf", folder / name, layout)
    assert main(arguments(folder, "straight")) == 0
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; ``run`` was ended after its third step."""
    folder = Path(shutil.copytree(made, tmp_path / "world"))
    shutil.copytree(folder / "straight", folder / "run")
    go_back(folder / "run", 2)
    return folder


def arguments(world: Path, run: str, *overrides: str) -> list[str]:
    return ["train", str(world / "train.yaml"), *SMALL, f"output.dir={run}", *overrides]


def resumed(world: Path, *overrides: str) -> list[str]:
    return arguments(world, "run", "output.resume=true", *overrides)


def started(world: Path, run: str, *overrides: str, processes: int = 0) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *launch, "-m", "mm_finetune", *arguments(world, run, *overrides)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], step: int) -> None:
    """Until it says that it has done that step: ``step 3/40`` or ``step      3/100,000``."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1].partition("/")[0].replace(",", "")) >= step:
            return
    assert process.stderr is not None
    pytest.fail(f"ended before step {step}: {process.stderr.read()[-3000:]}")


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def same_as_straight(world: Path, run: str = "run") -> None:
    assert numbers(world / run) == numbers(world / "straight")
    assert differing(tensors(world / run, 6), tensors(world / "straight", 6)) == []


def test_killed_and_gone_on_with_is_the_same_run(world: Path) -> None:
    """``kill -9`` somewhere after a checkpoint of a run of forty steps."""
    forty = ["train.steps=40", "output.save_every=20", "data.packing=true", "train.dtype=bf16"]
    process = started(world, "killed", *forty)
    try:
        wait_for(process, 20)
        wait_for_file(world / "killed/checkpoint" / TRACKER)
    finally:
        process.kill()
        process.communicate()
    assert rows(world / "killed")[-1]["step"] < 40, "killed in the middle"
    assert steps(world / "killed") == [20]
    assert main(arguments(world, "killed", *forty, "output.resume=true")) == 0
    assert main(arguments(world, "straight40", *forty)) == 0
    assert numbers(world / "killed") == numbers(world / "straight40")
    assert differing(tensors(world / "killed", 40), tensors(world / "straight40", 40)) == []


def test_gone_on_with_in_one_process_is_the_same_run(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "run/checkpoint/.iter_0000004.partial").mkdir()
    (world / "run/anomalies.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
    (world / "run/bad.jsonl").write_text(
        '{"record": 1, "step": null}\n{"record": 2, "step": 2}\n{"record": 3, "step": 3}\n'
    )
    assert main(resumed(world)) == 0
    assert "resumes after step 2 of " in capsys.readouterr().out
    same_as_straight(world)
    assert [json.loads(row)["step"] for row in (world / "run/anomalies.jsonl").read_text().splitlines()] == [1]
    assert [json.loads(row)["record"] for row in (world / "run/bad.jsonl").read_text().splitlines()] == [2]
    assert not list((world / "run/checkpoint").glob(".*"))
    assert main(resumed(world)) == 0, "of a finished run nothing is left to do"
    same_as_straight(world)


def test_without_a_checkpoint_a_run_starts(world: Path) -> None:
    shutil.rmtree(world / "run/checkpoint")
    assert main(resumed(world)) == 0
    same_as_straight(world)


def test_a_run_that_ended_before_the_tracker_was_written(world: Path) -> None:
    (world / "run/checkpoint" / TRACKER).unlink()
    assert main(resumed(world)) == 0
    same_as_straight(world)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_signal_saves_and_ends_the_run(number: signal.Signals, world: Path) -> None:
    process = started(world, "stopped", "output.save_every=0", "train.steps=100000", "train.warmup_fraction=0")
    try:
        wait_for(process, 3)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    (done,) = steps(world / "stopped")
    assert f"{number.name}: saved step {done} and stopped" in said
    assert "Traceback" not in said
    assert rows(world / "stopped")[-1]["step"] == done
    more = [f"train.steps={done + 1}", "train.warmup_fraction=0", "output.resume=true"]
    assert main(arguments(world, "stopped", *more)) == 0
    assert steps(world / "stopped") == [done, done + 1]


@pytest.mark.long
def test_a_lost_process_ends_the_others_and_the_last_checkpoint_is_whole(world: Path) -> None:
    """``kill -9`` of one of two pipeline stages; what is left goes on in one process."""
    import psutil

    two = ["parallel.pp_size=2", "model.load=two"]
    process = started(world, "lost", *two, "train.steps=100000", processes=2)
    try:
        wait_for(process, 3)
        wait_for_file(world / "lost/checkpoint" / TRACKER)
        workers = [child for child in psutil.Process(process.pid).children() if "mm_finetune" in child.cmdline()]
        last = next(child for child in workers if child.environ()["RANK"] == "1")
        os.kill(last.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "error: process 0: another process of the run has ended" in said
    assert "output.resume=true" in said
    whole = json.loads((world / "lost/checkpoint" / TRACKER).read_text())
    assert main(arguments(world, "lost", f"train.steps={whole + 1}", "output.resume=true")) == 0
    assert rows(world / "lost")[-1]["step"] == whole + 1


def full_disk(monkeypatch: pytest.MonkeyPatch, writes: Callable[[int], bool]) -> None:
    """Writing fails as on a full disk at those writes, by number from 0, whose thread is the one that saves."""
    write, count = files._write_all, iter(range(1000))

    def limited(descriptor: int, view: memoryview) -> None:
        assert threading.current_thread().name == "mm-finetune-save"
        if writes(next(count)):
            os.write(descriptor, view[:8])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, view)

    monkeypatch.setattr(files, "_write_all", limited)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_in_the_middle_is_told_and_training_goes_on(
    background: str, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A write for each tensor, and two for the header; the second checkpoint then fails half-way.
    writes = 2 + sum(name.startswith("state/") for name in tensors(world / "straight", 2))
    full_disk(monkeypatch, lambda number: number == writes + writes // 2)
    assert main(arguments(world, "full", f"output.async_save={background}")) == 0
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "training goes on" in said
    assert steps(world / "full") == [2, 6]
    assert not list((world / "full/checkpoint").glob(".*"))
    assert numbers(world / "full") == numbers(world / "straight")


def test_a_full_disk_at_the_end_is_an_error_and_the_one_before_stays(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(resumed(world, "train.steps=4")) == 0
    full_disk(monkeypatch, lambda number: True)
    assert main(resumed(world, "output.keep_last=1")) == 2
    assert "the last checkpoint could not be written" in capsys.readouterr().err
    assert steps(world / "run") == [2, 4]
    assert (world / "run/checkpoint" / TRACKER).read_text() == "4"
    monkeypatch.undo()
    assert main(resumed(world, "output.keep_last=1")) == 0
    assert steps(world / "run") == [6]


def another_data_set(world: Path) -> None:
    path = world / "data/train.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps(records[::-1]))


def another_weight(world: Path) -> None:
    path = world / "one/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["text_decoder.embedding.word_embeddings.weight"][5, 5] += 1
    torch.save(content, path)


def summary(world: Path) -> Path:
    return world / "run/checkpoint/iter_0000002/state/state.json"


def state_file(world: Path) -> Path:
    return world / "run/checkpoint/iter_0000002/state/rank_00000.safetensors"


def cut_off(world: Path) -> None:
    os.truncate(state_file(world), state_file(world).stat().st_size // 2)


def flip(world: Path) -> None:
    content = bytearray(state_file(world).read_bytes())
    content[-1000] ^= 1
    state_file(world).write_bytes(content)


def other_shape(world: Path) -> None:
    content = state_file(world).read_bytes()
    state_file(world).write_bytes(content.replace(b"[1024, 128]", b"[1024, 129]"))


@pytest.mark.parametrize(
    ("damage", "more", "words"),
    [
        (None, ["train.seed=7"], ["train.seed was 0 and is 7", "another output.dir"]),
        (None, ["train.global_batch_size=8", "data.seq_length=99"], ["global_batch_size was 4", "data.seq_length"]),
        (None, ["lora.r=2"], ["lora.r was None and is 2"]),
        (None, ["train.freeze=[visual.*]"], ["train.freeze was []"]),
        (None, ["data.max_samples=19"], ["data.max_samples", "another data set", "20 records"]),
        (None, ["train.steps=1"], ["train.steps is 1, the checkpoint has done 2"]),
        (another_data_set, [], ["data.path", "another data set"]),
        (lambda w: summary(w).write_text("{"), [], ["state.json is damaged", "older one of none"]),
        (lambda w: summary(w).unlink(), [], ["has no state/state.json"]),
        (lambda w: state_file(w).unlink(), [], ["rank_00000.safetensors is damaged", "an older"]),
        (cut_off, [], ["rank_00000.safetensors is damaged"]),
        (flip, [], ["rank_00000.safetensors is damaged", "checksum"]),
        (other_shape, [], ["another model", "[1024, 129]", "[1024, 128]"]),
    ],
)  # fmt: skip
def test_what_can_not_be_gone_on_from_is_told(
    damage: Callable[[Path], object] | None,
    more: list[str],
    words: list[str],
    world: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if damage:
        damage(world)
    assert main(resumed(world, *more)) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert "Traceback" not in said
    assert steps(world / "run") == [2], "nothing is lost"


def test_frozen_weights_of_another_base_are_told(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen = ["train.freeze=[model.embed_tokens.*]", "train.steps=2"]
    assert main(arguments(world, "frozen", *frozen)) == 0
    another_weight(world)
    assert main(arguments(world, "frozen", *frozen, "output.resume=true")) == 2
    assert "the weights that aren't trained are others" in capsys.readouterr().err


def test_what_may_change_does_and_is_told(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["train.lr=2e-3", "train.steps=3", "data.workers=0", "train.micro_batch_size=4", "output.save_every=0"]
    assert main(resumed(world, *more)) == 0
    said = capsys.readouterr().out
    assert "train.lr was 0.001 and is 0.002" in said
    assert "workers" not in said
    assert steps(world / "run") == [2, 3]


def test_without_the_optimizer(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's flags: what is not saved must not be asked for; an optimizer that starts anew counts from 1."""
    assert main(arguments(world, "light", "output.no_save_optim=true", "output.no_save_rng=true")) == 0
    go_back(world / "light", 2)
    heavy, light = (world / name / "checkpoint/iter_0000002/state/rank_00000.safetensors" for name in ("run", "light"))
    assert light.stat().st_size < 0.4 * heavy.stat().st_size
    more = ["train.steps=3", "output.resume=true"]
    assert main(arguments(world, "light", *more)) == 2
    assert "output.no_load_optim=true" in capsys.readouterr().err
    anew = ["output.no_load_optim=true", "output.no_load_rng=true"]
    assert main(arguments(world, "light", *more, *anew)) == 0
    assert main(resumed(world, "train.steps=3", *anew)) == 0
    assert numbers(world / "light")[2][:2] == numbers(world / "run")[2][:2], "weights alone decide the next loss"
    state = json.loads(state_file(world).with_name("state.json").read_text())
    assert state["step"] == 2
    assert differing(tensors(world / "light", 3), tensors(world / "run", 3)) == []


def test_ctrl_c_says_what_is_saved_and_what_is_lost(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, handler = Trainer.step, signal.getsignal(signal.SIGINT)

    def interrupted(trainer: Trainer, *given: Any) -> Any:
        if len(rows(world / "run")) == 5:
            raise KeyboardInterrupt
        return step(trainer, *given)

    monkeypatch.setattr(Trainer, "step", interrupted)
    try:
        # In training's way, so that step 3 is on the disk at step 5, however slow the disk is.
        assert main(resumed(world, "output.save_every=3", "output.async_save=false")) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"mm-finetune: interrupted; {world}/run holds the checkpoint of step 3; output.resume=true goes on from there,"
        " steps 4 to 5 have to be done again"
    )
    monkeypatch.undo()
    assert main(resumed(world)) == 0
    same_as_straight(world)


def test_the_best_by_evaluation_stays_though_newer_ones_come(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the run goes on; a checkpoint between evaluations has no score and is no candidate."""
    scores = {2: 0.25, 4: 0.75, 5: 0.5, 6: 0.5, 7: 0.25}
    evaluate = Evaluator._evaluate

    def scored(evaluator: Evaluator, step: int, trainer: Trainer) -> Evaluation:
        found = evaluate(evaluator, step, trainer)
        return replace(found, answers=[replace(answer, score=scores[step]) for answer in found.answers])

    monkeypatch.setattr(Evaluator, "_evaluate", scored)
    often = ["train.eval_every=2", "train.eval_max_new_tokens=1", "data.eval_samples=1"]
    best = ["output.save_every=1", "output.keep_last=1", "output.keep_best=1", "output.async_save=false"]
    kept = [*often, f"data.eval_path={world}/data/train.json", *best]
    assert main(arguments(world, "best", *kept, "train.steps=5", "train.warmup_fraction=0")) == 0
    assert steps(world / "best") == [4, 5]
    more = ["train.steps=7", "train.warmup_fraction=0", "output.resume=true"]
    assert main(arguments(world, "best", *kept, *more)) == 0
    assert steps(world / "best") == [4, 7]


def test_the_best_and_the_newest_stay(world: Path) -> None:
    """Without evaluations the mean loss is the score: on these few records it falls, so the last ones are the best."""
    assert main(arguments(world, "kept", "output.save_every=1", "output.keep_last=1", "output.keep_best=2")) == 0
    scores = {
        step: json.loads((world / f"kept/checkpoint/iter_{step:07d}/state/state.json").read_text())["score"]
        for step in steps(world / "kept")
    }
    losses = [row["loss"] for row in rows(world / "kept")]
    means = {step: -sum(losses[:step]) / step for step in range(1, 7)}
    best = sorted(means, key=lambda step: means[step])[-2:]
    assert set(scores) == {*best, 6}
    assert scores[6] == pytest.approx(means[6])
