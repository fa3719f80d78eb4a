"""What a run says of itself: the lines people read, the lines scripts read, and what is left when it ends too early."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mm_finetune.errors import AnomalyError, ConfigError
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.weights import Training
from mm_finetune.selection import rates_of
from mm_finetune.watching import (
    Backward,
    Guard,
    ModelShape,
    RunLog,
    Work,
    open_trackers,
    require_trackers,
    step_flops,
)
from mm_finetune.watching.lines import duration


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, numbers: range, console: io.StringIO | None = None, **options: Any) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    log = RunLog(path, steps=numbers[-1], samples=8, console=console or io.StringIO(), **options)
    for step in numbers:
        log.step(step, loss=1.5, lr=1e-3, grad_norm=0.5, tokens=4000, flops=1e6)
    log.close()
    return rows_of(path)


def test_every_step_is_written_and_the_last_is_shown(tmp_path: Path) -> None:
    console = io.StringIO()
    rows = run(tmp_path, range(1, 4), console, memory=lambda: 3 * 2**30)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["eta_s"] == 0
    assert rows[0]["tokens_per_second"] > rows[0]["samples_per_second"] > 0
    assert rows[0]["memory_gib"] == 3
    assert rows[0]["mfu"] is None, "no peak is known"
    lines = console.getvalue().splitlines()
    assert lines[0].startswith("step 1/3  loss 1.5000  lr 1.00e-03  grad norm 0.500")
    assert lines[-1].startswith("step 3/3")
    assert lines[-1].endswith("data wait 0%  3.0 GiB  ETA 0:00")


def test_other_ranks_are_silent() -> None:
    console = io.StringIO()
    log = RunLog(None, steps=1, samples=1, console=console)
    assert log.step(1, loss=0.0, lr=0.0, grad_norm=0.0, tokens=1).step == 1
    log.close()
    assert console.getvalue() == ""


def test_rates_follow_from_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Started at 0, waits for data from 0 to 1, ends a step of 4 s.
    times: Iterator[float] = iter([0.0, 0.0, 1.0, 4.0])
    monkeypatch.setattr("mm_finetune.watching.run_log.time", SimpleNamespace(monotonic=lambda: next(times)))
    console = io.StringIO()
    log = RunLog(tmp_path / "m.jsonl", steps=3, samples=8, console=console, peak_flops=1e12)
    with log.waiting():
        pass
    metrics = log.step(1, loss=1.0, lr=0.0, grad_norm=0.0, tokens=400, flops=2e12)
    log.close()
    assert (metrics.tokens_per_second, metrics.samples_per_second, metrics.step_s) == (100, 2, 4)
    assert metrics.data_wait == 0.25
    assert metrics.mfu == 0.5, "2e12 operations in 4 s of 1e12 a second"
    assert metrics.eta_s == 8
    assert "MFU 50.0%  data wait 25%  ETA 0:08" in console.getvalue()


def test_lines_every_n_steps(tmp_path: Path) -> None:
    console = io.StringIO()
    run(tmp_path, range(1, 8), console, log_every=3)
    assert [line.split()[1] for line in console.getvalue().splitlines()] == ["3/7", "6/7", "7/7"]


def test_the_megatron_line_is_read_by_the_awk_of_peoples_scripts(tmp_path: Path) -> None:
    console = io.StringIO()
    rows = run(tmp_path, range(1, 4), console, log_format="megatron", log_tps=True)
    lines = console.getvalue().splitlines()
    assert len(lines) == 3, "each step, as Megatron's"
    for line, row in zip(lines, rows, strict=True):
        fifth = subprocess.run(["awk", "-F:", "{print $5}"], input=line, capture_output=True, text=True, check=True)
        assert float(fifth.stdout.split()[0]) == pytest.approx(row["step_s"] * 1000, abs=0.06)
        names = [part.rpartition(":")[0].strip() for part in line.split("|")[1:-1]]
        assert names == [
            "consumed samples", "elapsed time per iteration (ms)", "learning rate", "global batch size",
            "tokens per sample", "loss", "loss scale", "grad norm", "number of skipped iterations",
            "number of nan iterations",
        ]  # fmt: skip
    # The published line, with its widths: facts of MindSpeed MM's log.
    assert "] iteration        3/       3 | consumed samples:           24 | elapsed time" in lines[2]
    assert "| learning rate: 1.000000E-03 | global batch size:     8 | tokens per sample: 5.00E+02 |" in lines[2]
    assert "| loss: 1.500000E+00 | loss scale: 1.0 | grad norm: 0.500 |" in lines[2]
    assert lines[2].endswith("number of skipped iterations:   0 | number of nan iterations:   0 |")


def test_without_log_tps_the_field_is_missing_and_a_nan_is_shown(tmp_path: Path) -> None:
    console = io.StringIO()
    log = RunLog(tmp_path / "m", steps=1, samples=1, console=console, log_format="megatron")
    log.step(1, loss=math.nan, lr=0.0, grad_norm=math.inf, tokens=1, skipped=True)
    log.close()
    assert "tokens per sample" not in console.getvalue()
    assert "loss: NAN" in console.getvalue()
    assert console.getvalue().endswith("skipped iterations:   1 | number of nan iterations:   1 |\n")
    assert rows_of(tmp_path / "m")[0]["loss"] is None, "NaN is not JSON"


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    before = run(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    after = run(tmp_path, range(5, 7), done=4)
    assert [row["step"] for row in after] == [1, 2, 3, 4, 5, 6]
    assert after[:4] == before[:4]
    assert after[4]["elapsed_s"] >= before[3]["elapsed_s"]
    assert [row["step"] for row in run(tmp_path, range(1, 3))] == [1, 2], "a new run begins an empty file"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_process_leaves_whole_lines(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import signal, sys; from pathlib import Path; from mm_finetune.watching import RunLog;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "log = RunLog(Path(sys.argv[1]), steps=10**9, samples=1, log_every=1);"
        "[log.step(n, loss=1.0, lr=1.0, grad_norm=1.0, tokens=1) for n in range(1, 10**9)]"
    )
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, stderr=-3) as process:
        assert process.stdout is not None
        for _ in range(200):
            process.stdout.readline()
        process.send_signal(number)
        process.stdout.read()
    text = path.read_text()
    assert text.endswith("\n")
    steps = [row["step"] for row in rows_of(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 200


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (11220, "3:07:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# Trackers.


class Fake(ModuleType):
    """A module with a specification, that notes what is called."""

    def __init__(self, name: str, run: Any = None) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[Any, ...]] = []
        self.run = run
        for function in ("init", "log", "finish"):
            setattr(self, function, self._noted(function))

    def _noted(self, function: str) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((function, args, kwargs))
            return self.run

        return noted


@pytest.mark.parametrize(
    ("name", "options"),
    [("wandb", {"dir": "FOLDER", "name": "run"}), ("swanlab", {"logdir": "FOLDER", "experiment_name": "run"})],
)
def test_hosted_trackers_see_every_step(
    name: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, folder = Fake(name), tmp_path / "run"
    folder.mkdir()
    monkeypatch.setitem(sys.modules, name, fake)
    require_trackers([name])
    trackers = open_trackers([name], folder, project="mine", settings={"train": {"lr": 1}})
    run(folder, range(1, 3), trackers=trackers)
    options = {key: str(folder) if value == "FOLDER" else value for key, value in options.items()}
    assert fake.calls[0] == ("init", (), {"project": "mine", "config": {"train": {"lr": 1}}, **options})
    assert [call[0] for call in fake.calls[1:]] == ["log", "log", "finish"]
    values, step = fake.calls[2][1][0], fake.calls[2][2]["step"]
    assert step == 2
    assert {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"} <= values.keys()


def test_tensorboard_sees_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    writer = SimpleNamespace(
        add_scalar=lambda *args: written.append(args), add_text=lambda *args: None, close=lambda: written.append("end")
    )
    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder, purge_step: SimpleNamespace(**vars(writer), folder=folder, purged=purge_step)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (tracker,) = open_trackers(["tensorboard"], tmp_path, project="p", settings={})
    assert tracker.writer.folder == str(tmp_path / "tensorboard")  # type: ignore[attr-defined]
    run(tmp_path, range(1, 3), trackers=[tracker])
    assert ("train/loss", 1.5, 2) in written
    assert written[-1] == "end"
    assert tracker.writer.purged == 0, "a run that starts anew"  # type: ignore[attr-defined]
    (tracker,) = open_trackers(["tensorboard"], tmp_path, project="p", settings={}, done=4)
    assert tracker.writer.purged == 5, "what an ended run logged beyond its checkpoint is hidden"  # type: ignore[attr-defined]


def test_a_hosted_run_goes_on_in_the_same_run_where_it_takes_new_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B: steps must rise (docs.wandb.ai, log); a resumed run says its ``starting_step``, one behind the last."""
    fake = Fake("wandb", run=SimpleNamespace(id="abc", starting_step=0))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path, range(1, 8), trackers=open_trackers(["wandb"], tmp_path, project="mine", settings={}))
    assert {"id", "resume"}.isdisjoint(fake.calls[0][2])
    fake.calls.clear()
    fake.run.starting_step = 8
    trackers = open_trackers(["wandb"], tmp_path, project="mine", settings={}, done=4)
    run(tmp_path, range(5, 10), trackers=trackers, done=4)
    assert (fake.calls[0][2]["id"], fake.calls[0][2]["resume"]) == ("abc", "allow")
    assert [call[2]["step"] for call in fake.calls if call[0] == "log"] == [8, 9]
    fake.calls.clear()
    open_trackers(["wandb"], tmp_path, project="mine", settings={})
    assert "id" not in fake.calls[0][2], "a run that starts anew is another run"
    (tmp_path / "trackers.json").write_text('{"wandb": ')
    open_trackers(["wandb"], tmp_path, project="mine", settings={}, done=4)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "abc"}


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_finetune.watching.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="names swanlab, which is not installed: pip install swanlab"):
        require_trackers(["swanlab"])


# Steps that are refused.


def test_a_number_that_is_none_stops_the_run_and_names_the_records(tmp_path: Path) -> None:
    guard = Guard(tmp_path / "a.jsonl", policy="stop")
    assert guard.decide(2.0, 1.0)
    guard.settle(1, [4, 5])
    assert not (tmp_path / "a.jsonl").exists()
    assert not guard.decide(2.0, math.inf)
    with pytest.raises(AnomalyError, match=r"step 2 of records 7, 8: gradient norm is no number.*train.on_nan=skip"):
        guard.settle(2, [7, 8])
    (row,) = rows_of(tmp_path / "a.jsonl")
    assert row["samples"] == [7, 8]
    assert (row["step"], row["kind"], row["grad_norm"], row["action"]) == (
        2,
        "gradient norm is no number",
        None,
        "stop",
    )


def test_skipping_goes_on_but_not_for_ever(tmp_path: Path) -> None:
    guard = Guard(tmp_path / "a.jsonl", policy="skip")
    for step in range(1, 20):
        assert not guard.decide(math.nan, 1.0)
        guard.settle(step, [step])
    assert guard.decide(1.0, 1.0)
    guard.settle(20, [20])
    for step in range(21, 40):
        guard.decide(math.nan, 1.0)
        guard.settle(step, [step])
    guard.decide(math.nan, 1.0)
    with pytest.raises(AnomalyError, match="20th step in a row"):
        guard.settle(40, list(range(99)))
    assert len(rows_of(tmp_path / "a.jsonl")) == 19 + 20


def test_a_spike_is_measured_against_the_median_of_earlier_losses() -> None:
    guard = Guard(None, policy="skip", spike_factor=2.0)
    assert guard.decide(100.0, 1.0), "nothing to compare with yet"
    for _ in range(10):
        assert guard.decide(3.0, 1.0)
    assert guard.decide(5.9, 1.0)
    assert not guard.decide(6.1, 1.0)
    assert guard.found is not None
    assert (guard.found.kind, guard.found.limit) == ("loss spike", 6.0)
    assert not guard.decide(6.1, 1.0), "a refused loss does not raise the median"
    assert Guard(None, policy="skip").decide(1e9, 1.0)


# Arithmetic.


def mini_config() -> Any:
    from mm_finetune.mini.model import model_config

    names = ("<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return model_config(SimpleNamespace(get_vocab=lambda: {name: number for number, name in enumerate(names)}))


@pytest.mark.parametrize("freeze", [[], ["visual.*"], ["model.layers.*", "lm_head.*"], ["visual.blocks.*"]], ids=str)
def test_operations_are_those_that_torch_counts(freeze: list[str]) -> None:
    """transformers' model, eager so that every product is counted; two pictures, windows of odd sizes."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = mini_config()
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    grids = [(1, 6, 10), (1, 8, 8)]
    for name, parameter in model.named_parameters():
        published = name.removeprefix("model.").replace("language_model.", "model.")
        parameter.requires_grad_(not any(fnmatch(published, pattern) for pattern in freeze))
    patches, tokens = 60 + 64, 50
    ids = torch.full((1, tokens), 9)
    ids[0, 1:16] = ids[0, 20:36] = config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": torch.randn(patches, 1176), "image_grid_thw": torch.tensor(grids)}
    with FlopCounterMode(display=False) as counter:
        model(**inputs, mm_token_type_ids=(ids == config.image_token_id).int()).logits.sum().backward()
    architecture = Architecture.of(config.to_dict())
    rates = rates_of(list(architecture.shapes()), freeze=freeze, lr_scale={})
    training = Training(element=4, distributed=False, recompute="none", rates=rates)
    work = Work(lengths=[tokens], grids=grids, loss_tokens=tokens)
    ours = step_flops(ModelShape.of(config), work, Backward.of(training, architecture))
    # Pixels need no gradient.
    unneeded = 2 * patches * 1176 * config.vision_config.hidden_size * ("visual.*" not in freeze)
    # The rotary tables are made by a product of positions and frequencies.
    assert counter.get_total_flops() == pytest.approx(ours - unneeded, rel=1e-3)


def test_frozen_weights_save_what_they_save() -> None:
    shape = ModelShape.of(mini_config())
    work = Work(lengths=[30, 20], grids=[(1, 8, 8)], loss_tokens=10)
    text_only = Work(lengths=[30, 20], grids=[], loss_tokens=10)
    everything, text = step_flops(shape, work), step_flops(shape, text_only)
    frozen = step_flops(shape, work, Backward(vision=0.0))
    assert frozen - text == pytest.approx((everything - text) / 3)
    joined = step_flops(shape, Work(lengths=[50], grids=[], loss_tokens=10))
    # 4 layers, 128 wide: 4 operations for each pair of tokens that only the joined sample has, three times.
    assert joined - text == 3 * 4 * 4 * 128 * (50**2 - 30**2 - 20**2)
