"""Evaluations that are interrupted, dealt over processes, or meet records that can't be asked; and single questions."""

from __future__ import annotations

import base64
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_worlds import lively_model, pictures, samples, write_records
from safetensors.torch import load_file, save_file

from mm_datafmt import Message, Sample
from mm_finetune.cli import main
from mm_finetune.errors import CheckpointError, DataError, OutputExistsError
from mm_finetune.evaluation import Answerer, Evaluation, evaluate
from mm_finetune.evaluation.adapters import merge_adapter
from mm_finetune.evaluation.answerer import load_model
from mm_finetune.evaluation.prompts import Prompt

SIZES: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def lively(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model(mini, tmp_path_factory.mktemp("lively") / "hf")


@pytest.fixture
def data(mini: Path, tmp_path: Path) -> Path:
    """Seven records: a picture that is damaged, and one without an answer, are among them."""
    (tmp_path / "images").mkdir()
    for name in pictures(mini):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).symlink_to(mini / "data/images" / name)
    whole = (mini / "data/images" / pictures(mini)[7]).read_bytes()
    (tmp_path / "images/cut.png").write_bytes(whole[: len(whole) // 2])
    question = Message("user", "<image>\nWhat is this?")
    entries = samples(mini)
    entries.insert(2, Sample((question, Message("assistant", "x")), ("cut.png",)))
    entries.insert(4, Sample((question,), (pictures(mini)[0],)))
    return write_records(tmp_path / "records.json", entries)


def options(lively: Path, data: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--batch_size", "2", "--max_new_tokens", "3"]
    return ["eval", "--hf_dir", str(lively), "--data", str(data), "--output", str(output), *sizes,
            "--dataset_dir", str(data.parent / "images"), *more]  # fmt: skip


def test_a_bad_record_is_counted_and_told_and_stops_nothing(
    lively: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = data.parent / "out.json"
    assert main(options(lively, data, output)) == 1
    printed = capsys.readouterr().out
    assert "of 6" in printed
    assert "2 records could not be asked and are not counted" in printed
    value = json.loads(output.read_text())
    assert [failure["number"] for failure in value["failures"]] == [3, 5]
    assert "cut.png" in value["failures"][0]["reason"]
    assert "does not end with a question" in value["failures"][1]["reason"]
    assert [sample["answer"] for sample in value["samples"]] == ["7", "wet", "moon", "both", "No.", "3"]
    assert Evaluation.load(output).failures[1].number == 5
    assert [path.name for path in data.parent.iterdir() if "answers" in path.name] == [], "it goes when all is written"


def test_what_is_no_record_is_left_out_like_any_other(
    lively: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = json.loads(data.read_text())
    lines, output = data.with_name("records.jsonl"), data.parent / "out.json"
    lines.write_text("\n".join([json.dumps(first), '{"messages": [', '{"messages": []}', json.dumps(second)]))
    assert main(options(lively, lines, output)) == 1
    assert "2 records could not be asked and are not counted" in capsys.readouterr().out
    unread, unfit = json.loads(output.read_text())["failures"]
    assert unread == {"number": 2, "reason": "not valid JSON: Expecting value (line 2)"}
    assert (unfit["number"], unfit["reason"].partition(",")[0]) == (3, "'messages' must be a list of at least one turn")
    assert [sample["answer"] for sample in json.loads(output.read_text())["samples"]] == ["7", "wet"]


def test_nothing_is_left_of_an_evaluation_of_nothing(
    lively: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the next one, of a repaired data set, would be asked to go on with it."""
    damaged = write_records(data.parent / "damaged.json", [Sample((Message("user", "<image>\nWhat?"),
                            Message("assistant", "x")), ("cut.png",))])  # fmt: skip
    output = data.parent / "out.json"
    assert main(options(lively, damaged, output)) == 2
    assert "no record can be asked; the first one: " in capsys.readouterr().err
    assert [path.name for path in data.parent.iterdir() if path.name.startswith("out.json")] == []


class PluggedOutError(Exception):
    """The machine goes away."""


def test_an_interrupted_evaluation_goes_on_with_the_same_answers(
    lively: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data.parent / "images"
    straight = evaluate(lively, data, data.parent / "straight.json", dataset_dir=images, **SIZES)
    asked: list[int] = []
    answer, limit = Answerer.answer, 2

    def counted(self: Answerer, prompts: Sequence[Prompt]) -> list[str]:
        if len(asked) == limit:
            raise PluggedOutError
        asked.append(len(prompts))
        return answer(self, prompts)

    output, journal = data.parent / "out.json", data.parent / "out.json.answers.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", counted)
        with pytest.raises(PluggedOutError):
            evaluate(lively, data, output, dataset_dir=images, **SIZES)
    assert not output.exists()
    kept = journal.read_bytes()
    journal.write_bytes(kept + b'{"number": 6, "ima')  # half a line
    with pytest.raises(OutputExistsError, match="add --resume to go on, or --overwrite to begin anew"):
        evaluate(lively, data, output, dataset_dir=images, **SIZES)
    with pytest.raises(OutputExistsError, match=r"another evaluation \(max_new_tokens\)"):
        evaluate(lively, data, output, dataset_dir=images, batch_size=2, max_new_tokens=2, resume=True)
    del asked[:]
    limit = 99
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", counted)
        resumed = evaluate(lively, data, output, dataset_dir=images, resume=True, **SIZES)
    assert resumed == straight
    assert output.read_bytes() == (data.parent / "straight.json").read_bytes()
    assert 0 < sum(asked) < 6, "what was answered is not asked again"
    assert not journal.exists()


@pytest.mark.long
def test_two_processes_give_the_file_that_one_gives(lively: Path, data: Path) -> None:
    one, two = data.parent / "one.json", data.parent / "two.json"
    assert main(options(lively, data, one)) == 1
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mm_finetune"]
    done = subprocess.run(
        [*launch, *options(lively, data, two)], capture_output=True, text=True, timeout=200, check=False
    )
    assert "exitcode  : 1" in done.stderr, "two records are bad"
    assert done.stdout.count("answers: ") == 1, "rank 0 alone speaks"
    assert two.read_bytes() == one.read_bytes()


def test_a_table_of_vlmevalkit_from_the_command_line(
    mini: Path, lively: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "DocVQA_VAL.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", "question", "answer"])
        for number, name in enumerate(pictures(mini)[:4]):
            content = base64.b64encode((mini / "data/images" / name).read_bytes()).decode()
            writer.writerow([number, content, f"What is {number}?", "['something', 'anything']"])
    output = tmp_path / "out.json"
    command = ["eval", "--hf_dir", str(lively), "--data", str(path), "--output", str(output)]
    assert main([*command, "--max_new_tokens", "8"]) == 0
    assert "metric: anls" in capsys.readouterr().out
    # The same pictures as files, asked the same, give the same answers.
    prompt = "<image>What is {}?\nAnswer the question using a single word or phrase."
    entries = [
        Sample((Message("user", prompt.format(n)), Message("assistant", "something")), (name,))
        for n, name in enumerate(pictures(mini)[:4])
    ]
    records = write_records(tmp_path / "records.json", entries)
    files = evaluate(lively, records, tmp_path / "files.json", dataset_dir=mini / "data/images", metric="anls")
    found = Evaluation.load(output)
    assert [answer.prediction for answer in found.answers] == [answer.prediction for answer in files.answers]
    assert found.metric == "anls"


def test_one_question(mini: Path, lively: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked from the command line it is answered as a record with the same text is."""
    names = pictures(mini)[:2]
    files = [word for name in names for word in ("--image", str(mini / "data/images" / name))]
    command = ["infer", str(lively), *files, "Which?", "--max_new_tokens", "4"]
    assert main(command) == 0
    said = capsys.readouterr().out
    entry = Sample((Message("user", "<image>\n<image>\nWhich?"), Message("assistant", "x")), tuple(names))
    records = write_records(mini.parent / "one.json", [entry])
    root = mini / "data/images"
    asked = evaluate(lively, records, mini.parent / "one.out.json", dataset_dir=root, max_new_tokens=4, overwrite=True)
    assert said == asked.answers[0].prediction + "\n"
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == said[:-1]
    assert len(told["image_grid_thw"]) == 2
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out.strip() == said.strip()
    assert main([*command, "--system", "You are a parrot."]) == 0
    assert capsys.readouterr().out != said, "the system turn is read"
    assert main(["infer", str(lively), "Which?", "--temperature", "2", "--max_new_tokens", "4", "--json"]) == 0
    drawn = capsys.readouterr().out
    assert main(["infer", str(lively), "Which?", "--temperature", "2", "--max_new_tokens", "4", "--json"]) == 0
    assert capsys.readouterr().out == drawn, "the same seed draws the same"
    assert main(["infer", str(lively), "--image", "none.png", "Which?"]) == 2
    assert "none.png does not exist" in capsys.readouterr().err
    capsys.readouterr()
    for words, message in (
        (["See", "--temperature", "-1"], "--temperature is -1.0; it must be 0 or more"),
        (["See", "--temperature", "nan"], "--temperature is nan; it must be 0 or more"),
        (["See", "--seed", str(2**64)], f"--seed is {2**64}; it must lie between 0 and"),
        (["See", "--max_new_tokens", "0"], "--max_new_tokens is 0; it must be 1 or more"),
        ([" "], "the question is empty"),
    ):
        assert main(["infer", str(lively), *words]) == 2
        assert message in capsys.readouterr().err


def test_pictures_are_those_of_the_training_run(mini: Path, lively: Path, tmp_path: Path) -> None:
    """Its limit of 28 x 28 pixels makes one token of every picture."""
    config = tmp_path / "train.yaml"
    config.write_text(
        f"model: {{hf_dir: {lively}, load: mm}}\ndata: {{path: a.json, min_pixels: 784, max_pixels: 784}}\n"
        "train: {steps: 1, global_batch_size: 1}\noutput: {dir: run}\n"
    )
    picture = str(mini / "data/images" / pictures(mini)[0])
    command = [sys.executable, "-m", "mm_finetune", "infer", str(lively), "--image", picture, "Hm?", "--json"]
    command += ["--max_new_tokens", "1", "--train_config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["image_grid_thw"] == [[1, 2, 2]]


LAYER = "model.language_model.layers.0.self_attn.q_proj"


def adapter(folder: Path, name: str = LAYER, **config: Any) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    halves = {"lora_A": torch.randn(4, 128, generator=generator), "lora_B": torch.randn(128, 4, generator=generator)}
    save_file(
        {f"base_model.model.{name}.{half}.weight": t for half, t in halves.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("name", "config", "scale"),
    [
        (LAYER, {}, 2.0),
        ("model.layers.0.self_attn.q_proj", {}, 2.0),  # as transformers before 4.52 called it
        (LAYER, {"use_rslora": True}, 4.0),  # alpha / sqrt(r), arXiv 2312.03732
        (LAYER, {"alpha_pattern": {"q_proj": 4}}, 1.0),
    ],
)
def test_an_adapter_is_added_to_the_weights(lively: Path, tmp_path: Path, name: str, config: Any, scale: float) -> None:
    folder = adapter(tmp_path / "adapter", name, **config)
    model = load_model(lively)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merge_adapter(model, folder)
    halves = load_file(folder / "adapter_model.safetensors")
    down, up = (halves[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    for key, value in model.state_dict().items():
        expected = before[key] + scale * up @ down if key == f"{LAYER}.weight" else before[key]
        assert torch.allclose(value, expected, atol=1e-5), key


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("model.language_model.layers.9.self_attn.q_proj", {}, "another model: .*layers.9"),
        ("model.language_model.layers.0.mlp.up_proj", {}, "128 x 128 there, 352 x 128 here"),
        (LAYER, {"use_dora": True}, "not plain LoRA: {'use_dora': True}"),
        (LAYER, {"peft_type": "IA3"}, "not plain LoRA"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    lively: Path, tmp_path: Path, name: str, config: Any, words: str
) -> None:
    folder = adapter(tmp_path / "adapter", name, **config)
    with pytest.raises(CheckpointError, match=words):
        merge_adapter(load_model(lively), folder)
    with pytest.raises(CheckpointError, match="is no PEFT folder"):
        merge_adapter(load_model(lively), tmp_path / "none")


def test_a_choice_among_records(mini: Path, lively: Path, tmp_path: Path) -> None:
    """The options stand in the question; a record without any can't be asked."""
    entries = [
        Sample((Message("user", "Which?\nA. red\nB. green"), Message("assistant", answer)))
        for answer in ("A", "green", "blue")
    ]
    data = write_records(tmp_path / "a.json", [*entries, samples(mini)[1]])
    found = evaluate(lively, data, tmp_path / "out.json", metric="choice", max_new_tokens=2)
    assert [answer.answer for answer in found.answers] == ["A", "B"]
    assert [failure.number for failure in found.failures] == [3, 4]
    with pytest.raises(DataError, match="no record"):
        evaluate(lively, write_records(data, [samples(mini)[1]]), tmp_path / "none.json", metric="choice")
