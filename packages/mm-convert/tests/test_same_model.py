"""Two folders hold the same model, or it is said where they differ."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recorded_models import Recorded
from safetensors.torch import load_file, save_file
from tiny_checkpoint import MakeModel, Tensors, new_names, save_model, tensors

from mm_convert import Converter, Layout, ModelError, Segment, same_model, verify
from mm_convert.cli import main
from mm_convert.comparing import Side, differing_elements

QWEN = Converter.named("Qwen2_5_VLConverter")
ONE = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))
TWO = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2)
VIRTUAL = Layout(llm_pp_layers=((0, 1), (2, 2)), vit_pp_layers=((3, 0), (0, 0)), tp_size=4)
FOLDERS = ("hf", "new", "one", "two", "virtual")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in many folders."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "hf", tensors())
    save_model(folder / "new", new_names(tensors()), nested=True, shards=1)
    for name, layout in (("one", ONE), ("two", TWO), ("virtual", VIRTUAL)):
        QWEN.hf_to_mm(folder / "hf", folder / name, layout)
    return folder


@pytest.mark.parametrize("b", FOLDERS)
@pytest.mark.parametrize("a", FOLDERS)
def test_any_two_layouts_of_a_model_are_the_same(a: str, b: str, made: Path) -> None:
    found = verify(made / a, made / b, full=True)
    assert (found.differences, found.how) == ((), "bytes")


def change_hf(folder: Path, change: Callable[[Tensors], object]) -> None:
    for path in folder.glob("*.safetensors"):
        content = load_file(path)
        change(content)
        save_file(content, path, metadata={"format": "pt"})


def change_mm(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = min(folder.glob("release/mp_rank_00*/model_optim_rng.pt"))
    content = torch.load(path, weights_only=True)
    change(content["model" if "model" in content else "model0"])
    torch.save(content, path)


Q = "model.layers.0.self_attn.q_proj.weight"
QKV = "text_decoder.decoder.layers.0.self_attention.linear_qkv.weight"
PROJECTION = "text_decoder.decoder.layers.0.self_attention.linear_proj.weight"


def add_one(name: str, elements: int) -> Callable[[Tensors], None]:
    def change(held: Tensors) -> None:
        if name in held:
            held[name].view(-1)[:elements] += 1

    return change


@pytest.mark.parametrize("other", ["hf", "one", "two"])
def test_changed_elements_are_counted(other: str, made: Path, tmp_path: Path) -> None:
    """Three elements of a query matrix, which is fused: they lie in its first group, on the first rank."""
    shutil.copytree(made / "hf", tmp_path / "hf")
    change_hf(tmp_path / "hf", add_one(Q, 3))
    for pair in ((tmp_path / "hf", made / other), (made / other, tmp_path / "hf")):
        [difference] = verify(*pair).differences
        assert (difference.kind, difference.elements) == ("bytes", 3)
        assert Q in difference.name + difference.detail


@pytest.mark.parametrize(("name", "elements"), [(QKV, 5), (PROJECTION, 9)])
@pytest.mark.parametrize("other", ["hf", "virtual", "two"])
def test_a_changed_megatron_folder(name: str, elements: int, other: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "two", tmp_path / "two")
    change_mm(tmp_path / "two", add_one(name, elements))
    for pair in ((tmp_path / "two", made / other), (made / other, tmp_path / "two")):
        differences = verify(*pair).differences
        assert {difference.kind for difference in differences} == {"bytes"}
        assert sum(difference.elements or 0 for difference in differences) == elements
        assert all(name in difference.name for difference in differences)


def test_missing_shape_and_dtype(made: Path, tmp_path: Path) -> None:
    def spoil(held: Tensors) -> None:
        if "model.norm.weight" in held:
            held["other"] = held.pop("model.norm.weight")
        if Q in held:
            held[Q] = held[Q][:-1].clone()
        if "lm_head.weight" in held:
            held["lm_head.weight"] = held["lm_head.weight"].half()

    shutil.copytree(made / "new", tmp_path / "bad")
    old = {name.replace("model.language_model.", "model.") for name in load_file(made / "new" / "model.safetensors")}
    assert Q in old
    save_file(tensors(), tmp_path / "bad" / "model.safetensors")
    change_hf(tmp_path / "bad", spoil)
    found = {(d.kind, d.name) for d in verify(made / "new", tmp_path / "bad").differences}
    assert found == {
        ("missing", "model.language_model.norm.weight"), ("missing", "other"), ("shape", Q), ("dtype", "lm_head.weight")
    }  # fmt: skip


def test_a_megatron_folder_that_lacks_a_tensor(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "two", tmp_path / "two")
    change_mm(tmp_path / "two", lambda held: held.pop(PROJECTION))
    for other in ("hf", "one", "two"):
        for pair in ((made / other, tmp_path / "two"), (tmp_path / "two", made / other)):
            [difference] = verify(*pair).differences
            assert (difference.kind, difference.detail) == ("missing", f"in {tmp_path / 'two'}")
            assert PROJECTION in difference.name
    shutil.copytree(made / "one", tmp_path / "one")
    change_mm(tmp_path / "one", lambda held: held.pop(PROJECTION))
    with pytest.raises(ModelError, match=r"neither .*one/release nor .*two/release"):
        verify(tmp_path / "one", tmp_path / "two")


def test_manifests_make_it_quick_and_a_touched_file_is_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Segment] = []

    def counted(segment: Segment, a: Side, b: Side) -> int:
        read.append(segment)
        return differing_elements(segment, a, b)

    monkeypatch.setattr(same_model, "differing_elements", counted)
    for name in "ab":
        QWEN.hf_to_mm(made / "hf", tmp_path / name, TWO)
    QWEN.resplit(tmp_path / "a", tmp_path / "c", ONE)
    for pair in ("ab", "ac", "ca"):
        assert verify(tmp_path / pair[0], tmp_path / pair[1]).how == "manifests"
    assert not read
    path = tmp_path / "a" / "release" / "mp_rank_00_000" / "model_optim_rng.pt"
    os.utime(path)
    for pair in ("ab", "ac", "ca"):
        assert verify(tmp_path / pair[0], tmp_path / pair[1]).how == "bytes"
    assert read


def test_another_model_of_the_same_shapes_is_not_taken_for_the_source(made: Path, tmp_path: Path) -> None:
    """Headers of safetensors are those of any model of these shapes: what a manifest says of them is not enough."""
    hf = save_model(tmp_path / "hf", tensors(seed=0))
    tuned = save_model(tmp_path / "tuned", tensors(seed=1))
    QWEN.hf_to_mm(hf, tmp_path / "mm", ONE)
    assert not verify(tuned, tmp_path / "mm").same
    assert verify(hf, tmp_path / "mm").same


def test_commands_words_and_exit_codes(
    made: Path, tmp_path: Path, make_model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_model(**{Q: tensors()[Q] + 1})
    for command in ("verify", "diff"):
        assert main([command, str(made / "two"), str(made / "hf"), "--full"]) == 0
        assert "hold the same model" in capsys.readouterr().out
        assert main([command, str(made / "two"), str(hf)]) == 1
        out = capsys.readouterr().out
        assert f"from {Q}" in out
        assert " of " in out
        assert main([command, str(made / "two"), str(hf), "--json"]) == 1
        told = json.loads(capsys.readouterr().out)
        assert not told["same"]
        assert sum(d["elements"] for d in told["differences"]) == tensors()[Q].numel()
        assert main([command, str(made / "two"), str(tmp_path / "no")]) == 2
        assert "does not exist" in capsys.readouterr().err


def test_a_model_with_other_layers_is_not_comparable(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is said of lists that nobody typed."""
    hf = Recorded.named("qwen3_vl").write(tmp_path / "hf")
    other = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((4, 0),))
    Converter.named("Qwen3VLMegatronConverter").hf_to_mm(hf, tmp_path / "mm", other)
    for both in ([tmp_path / "mm", made / "hf"], [made / "two", hf], [made / "two", tmp_path / "mm"]):
        assert main(["verify", *map(str, both)]) == 2
        err = capsys.readouterr().err
        assert "but the model has 5 llm," in err
        assert "another model's, a part of one, or lacks the folder of a pipeline rank" in err


def test_unknown_models_compare_by_name(tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(1.5), "v": torch.zeros(0, 3)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "something"}')
    assert verify(tmp_path / "a", tmp_path / "b").same
    assert main(["verify", str(tmp_path / "a"), str(made / "two")]) == 2
    assert "no converter knows model_type 'something'" in capsys.readouterr().err
