"""One batch through everything: what is said of it, and that nothing is changed or written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mm_convert import Converter, Layout
from mm_datafmt import convert
from mm_finetune.cli import main
from mm_finetune.preview import preview

SMALL = ["train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "data.max_samples=8"]


@pytest.fixture(scope="module")
def world(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(mini, tmp_path_factory.mktemp("check") / "world"))
    convert(folder / "data/train.llava.json", folder / "data/train.json", image_dir=folder / "data/images")
    for name, llm, vit in (("mm", [[2, 2]], [[4, 0]]), ("mm-one", [[4]], [[4]])):
        layout = Layout(llm_pp_layers=llm, vit_pp_layers=vit)  # type: ignore[arg-type]
        Converter.named("Qwen2_5_VLConverter").hf_to_mm(folder / "hf", folder / name, layout)
    return folder


def one_process(world: Path, *overrides: str) -> list[str]:
    return [str(world / "train.yaml"), *SMALL, "parallel.pp_size=1", f"model.load={world}/mm-one", *overrides]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def loss_of(said: str) -> float:
    found = re.search(r"first batch: loss ([\d.]+), (\d+) tokens", said)
    assert found, said
    return float(found[1])


def test_what_is_said_is_true_and_nothing_changes(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(world)
    assert main(["check", *one_process(world, "train.freeze=[visual.*]")]) == 0
    said = capsys.readouterr().out
    assert digests(world) == before, "no file is written or changed"
    # 64 wide, four blocks, patches of 1176 numbers, four of them merged: 256 x 256 and 128 x 256.
    assert re.search(r"visual\.patch_embed +75,264 +frozen", said)
    assert re.search(r"lm_head +131,072 +trained", said)
    assert re.search(r"data: 8 of 8 records", said)
    assert re.search(r"layout: tp 1, pp 1, dp 1, recompute none", said)
    assert main(["train", *one_process(world, "train.freeze=[visual.*]", f"output.dir={world}/frozen")]) == 0
    row = json.loads((world / "frozen/metrics.jsonl").read_text().splitlines()[0])
    assert loss_of(said) == pytest.approx(row["loss"], abs=1e-4), "the loss of the first step"
    for percent in re.findall(r"([+-][\d.]+)%", said):
        assert abs(float(percent)) < 12, "planned and measured"


def test_the_first_record_is_shown_by_role(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((world / "data/train.json").read_text())[0]
    assert main(["check", *one_process(world)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("record 0 as the model sees it"))
    system, user, header, answer = lines[start + 1 : start + 5]
    assert system.split()[0] == "system"
    assert "You are a helpful assistant." in system
    assert user.split()[0] == "user"
    assert re.search(r"<\|vision_start\|><\|image_pad\|> x (4|16)<\|vision_end\|>", user)
    assert "loss" not in user
    assert "loss" not in header
    assert answer.split()[0] == "assistant"
    assert re.search(rf"loss +{re.escape(record['messages'][1]['content'])}<\|im_end\|>\\n$", answer)


def test_a_record_can_not_give_a_terminal_orders(mini: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from mm_finetune.data import EncodedSample

    tokenizer = AutoTokenizer.from_pretrained(mini / "hf")
    ids = torch.tensor(tokenizer("<|im_start|>user\n\x1b[31mred\x07\u202e<|im_end|>\n")["input_ids"])
    text = preview(EncodedSample(input_ids=ids, labels=ids, positions=ids.expand(3, -1)), tokenizer)
    assert text.isprintable()
    assert "\\x1b[31mred\\x07\\u202e" in text


def test_adapters_are_what_trains(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *one_process(world, "lora.r=4", "lora.target_modules=[q_proj]")]) == 0
    # Four layers, 128 wide: 4 x (128 + 128) numbers in each.
    assert re.search(r"all .* 4,096 trained", capsys.readouterr().out)


def test_faults_are_those_of_train(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *one_process(world, "train.setps=3")]) == 2
    assert "did you mean train.steps?" in capsys.readouterr().err
    assert main(["check", *one_process(world, "data.seq_length=20")]) == 2
    assert "data.seq_length is 20" in capsys.readouterr().err


@pytest.mark.long
def test_two_stages_say_the_same_loss_and_rank_0_alone_speaks(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "mm_finetune", "check", str(world / "train.yaml"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("first batch: loss") == 1
    assert len(re.findall(r"^ +[01] +weights", done.stdout, re.MULTILINE)) == 2
    assert main(["check", *one_process(world)]) == 0
    assert loss_of(done.stdout) == pytest.approx(loss_of(capsys.readouterr().out), abs=1e-4)
