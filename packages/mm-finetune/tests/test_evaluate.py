"""Evaluation: answers in batches are those one by one, which are those of a plain loop with stated positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_worlds import lively_model, samples, write_records
from safetensors.torch import load_file, save_file

from mm_datafmt import Sample
from mm_finetune.cli import main
from mm_finetune.errors import CheckpointError, ConfigError, DataError, OutputExistsError
from mm_finetune.evaluation import Answerer, Evaluation, Prompt, evaluate, load_model
from mm_finetune.evaluation.records import question_of
from mm_finetune.rope import mrope_positions
from mm_finetune.videos import VideoInputs

NEW_TOKENS = 4


@pytest.fixture(scope="module")
def lively(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model(mini, tmp_path_factory.mktemp("lively") / "hf")


def prompt_of(answerer: Answerer, sample: Sample, root: Path) -> Prompt:
    return answerer.prompts.read(answerer.prompts.outline(question_of(sample, 1, root)))


def plain_loop(answerer: Answerer, prompt: Prompt, *, flat: bool = False) -> str:
    """Greedy, the whole sequence anew for each token, with our M-RoPE positions (or plain ones: `flat`)."""
    model, ids = answerer.model, list(prompt.input_ids)
    images = prompt.images
    grid = images.image_grid_thw if images else torch.zeros(0, 3, dtype=torch.long)
    for _ in range(NEW_TOKENS):
        positions = mrope_positions(ids, grid, image_token_id=model.config.image_token_id)
        if flat:
            positions = torch.arange(len(ids)).expand(3, -1)
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([ids]), position_ids=positions[:, None], use_cache=False,
                pixel_values=images.pixel_values if images else None,
                image_grid_thw=images.image_grid_thw if images else None,
            ).logits  # fmt: skip
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == model.generation_config.eos_token_id:
            break
    text: str = answerer.tokenizer.decode(ids[len(prompt.input_ids) :], skip_special_tokens=True)
    return text.strip()


def test_batched_answers_are_those_of_a_plain_loop(mini: Path, lively: Path) -> None:
    answerer = Answerer(lively, max_new_tokens=NEW_TOKENS)
    prompts = [prompt_of(answerer, sample, mini / "data/images") for sample in samples(mini)]
    expected = [plain_loop(answerer, prompt) for prompt in prompts]
    # The comparison can fail: answers differ, and positions that ignore the rows and columns give others.
    assert len(set(expected)) == len(expected)
    assert [plain_loop(answerer, prompt, flat=True) for prompt in prompts[2:4]] != expected[2:4]
    assert answerer.answer(prompts) == expected
    assert [answerer.answer([prompt])[0] for prompt in prompts] == expected
    assert answerer.answer(prompts[::-1]) == expected[::-1]


def test_a_long_video_stands_where_it_stood_in_training(mini: Path, lively: Path) -> None:
    """Four steps of 5 s each, 2 x 2 merged patches; beside a prompt of another length: one is padded on the left."""
    answerer = Answerer(lively, max_new_tokens=2)
    config, grid, seconds = answerer.model.config, (4, 4, 4), (5.0,)
    ids = [5, 6, *[config.video_token_id] * 16, 7]
    positions = answerer.prompts.encoder.positions(ids, (), [grid], seconds)
    assert positions[:, -1].tolist() == [int(positions[:, :-1].max()) + 1] * 3
    film = VideoInputs(torch.zeros(64, 1176), torch.tensor([grid]), seconds)
    asked = [
        Prompt(input_ids=ids, positions=positions, videos=film),
        prompt_of(answerer, samples(mini)[1], mini / "data/images"),
    ]
    seen: list[torch.Tensor] = []
    text = answerer.model.model.language_model
    text.register_forward_pre_hook(lambda _, __, given: seen.append(given["position_ids"]), with_kwargs=True)
    answerer.answer(asked)
    for row, prompt in enumerate(asked):
        assert torch.equal(seen[0][-3:, row, -len(prompt.input_ids) :], prompt.positions)
        assert seen[1][-3:, row, 0].tolist() == (prompt.positions[:, -1] + 1).tolist()


def test_settings_of_the_folder_do_not_change_the_answers(mini: Path, lively: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(lively, folder)
    sampling = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "repetition_penalty": 3.0, "eos_token_id": [1]}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    answers = []
    for hf_dir in (lively, folder):
        answerer = Answerer(hf_dir, max_new_tokens=NEW_TOKENS)
        answers.append(answerer.answer([prompt_of(answerer, one, mini / "data/images") for one in samples(mini)]))
    assert answers[0] == answers[1]


def test_exact_matches_are_counted_by_question(
    mini: Path, lively: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = samples(mini)
    root = mini / "data/images"
    blind = evaluate(
        lively, write_records(tmp_path / "a.json", entries, ["?"] * 6), tmp_path / "a.out.json", dataset_dir=root
    )
    assert blind.accuracy == 0
    said = [answer.prediction for answer in blind.answers]
    # All right but the last, white space aside; the last one shares its question with the first.
    data = write_records(tmp_path / "b.json", entries, [f" {text}\n" for text in said[:5]] + ["no"])
    output = tmp_path / "b.out.json"
    options = ["--hf_dir", str(lively), "--data", str(data), "--output", str(output), "--dataset_dir", str(root)]
    assert main(["eval", *options, "--batch_size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "83.3%  of 6" in printed
    assert "50.0%  of 2" in printed
    value = json.loads(output.read_text())
    assert value["model"] == str(lively)
    assert value["accuracy"] == pytest.approx(5 / 6)
    assert value["groups"]["Which digit is this?"] == {"count": 2, "accuracy": 0.5}
    assert list(value["groups"])[2] == "Which photograph is this a part of?"
    assert [sample["correct"] for sample in value["samples"]] == [True] * 5 + [False]
    assert value["samples"][0] == {
        "image": entries[0].images[0], "question": "Which digit is this?", "answer": f" {said[0]}\n",
        "prediction": said[0], "correct": True,
    }  # fmt: skip
    assert value["samples"][1]["image"] is None
    assert (tmp_path / value["dataset_dir"] / entries[0].images[0]).is_file()
    assert (
        Evaluation.load(output).answers
        == evaluate(lively, data, output, dataset_dir=root, batch_size=1, overwrite=True).answers
    )


def test_an_existing_output_is_kept(mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text("mine")
    with pytest.raises(OutputExistsError, match="add --overwrite"):
        evaluate(mini / "hf", mini / "data/heldout.llava.json", output)
    with pytest.raises(OutputExistsError, match="not a file"):
        evaluate(mini / "hf", mini / "data/heldout.llava.json", tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="create it first"):
        evaluate(mini / "hf", mini / "data/heldout.llava.json", tmp_path / "no" / "out.json")
    assert output.read_text() == "mine"


def test_an_interruption_leaves_no_file(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "answer", interrupted)
    output = tmp_path / "out.json"
    data = mini / "data/heldout.llava.json"
    options = ["--data", str(data), "--dataset_dir", str(mini / "data/images"), "--output", str(output)]
    assert main(["eval", "--hf_dir", str(mini / "hf"), *options]) == 130
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("batch_size", "max_new_tokens"), [(0, 8), (64, 0)])
def test_numbers_that_cannot_be_are_refused(mini: Path, tmp_path: Path, batch_size: int, max_new_tokens: int) -> None:
    with pytest.raises(ConfigError, match="must be 1 or more"):
        evaluate(
            mini / "hf", mini / "data/heldout.llava.json", tmp_path / "o", batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip


def test_data_without_a_record_to_ask_is_refused_before_a_model_is_read(mini: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "a.json", samples(mini)[:1], ["?"])
    with pytest.raises(DataError, match=r"no record of .* can be asked; record 1: .*is --dataset_dir right"):
        evaluate(tmp_path, data, tmp_path / "out.json")
    data.write_text('[{"messages": [{"role": "user", "content": "only a question"}]}]')
    with pytest.raises(DataError, match=r"record 1: it does not end with a question and its answer"):
        evaluate(tmp_path, data, tmp_path / "out.json")
    data.write_text("[{")
    with pytest.raises(DataError, match=r"a\.json"):
        evaluate(tmp_path, data, tmp_path / "out.json")
    with pytest.raises(DataError, match="can't be read"):
        evaluate(tmp_path, tmp_path / "none.json", tmp_path / "out.json")


def test_a_folder_that_is_no_model_is_refused(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json; give the folder"):
        Answerer(tmp_path, max_new_tokens=1)


def damaged(mini: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(mini / "hf", folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(NORM), "missing keys: .*norm.weight"),
        (lambda weights: weights.update(surplus=torch.zeros(1)), "unexpected keys: surplus"),
        (lambda weights: weights.update({NORM: torch.zeros(3)}), "mismatched keys: .*norm.weight"),
    ],
    ids=["missing", "left over", "shape"],
)
def test_weights_that_do_not_fit_are_refused(mini: Path, tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_model(damaged(mini, tmp_path / "hf", change))


def test_damaged_and_absent_weights_are_refused(mini: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(mini / "hf", folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_model(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        load_model(folder)
