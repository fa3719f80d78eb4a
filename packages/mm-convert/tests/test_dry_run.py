"""The dry run tells the truth, and touches nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import published_models
import pytest
from test_bad_input import hf_to_mm, mm_to_hf
from test_resplit import resplit
from test_streaming import child
from tiny_checkpoint import MakeModel

from mm_convert import Converter, Layout
from mm_convert.cli import main
from mm_convert.dry_run import forecast

QWEN = Converter.named("Qwen2_5_VLConverter")


def planned(line: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    capsys.readouterr()
    assert main(["plan", *line, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main([*line, "--plan", "--json"]) == 0
    # Others may use the disk at the same time.
    assert {**json.loads(capsys.readouterr().out), "disk_free": 0} == {**told, "disk_free": 0}
    assert isinstance(told, dict)
    return told


def test_each_conversion_writes_what_its_plan_says(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mm, back, other = make_model(), tmp_path / "mm", tmp_path / "back", tmp_path / "other"
    lines = [(hf_to_mm(hf, mm, tp=2), mm), (mm_to_hf(mm, hf, back), back), (resplit(mm, other, "[5]", "[3]", 1), other)]
    for line, target in lines:
        before = sorted(tmp_path.rglob("*"))
        told = planned(line, capsys)
        assert sorted(tmp_path.rglob("*")) == before
        assert main(line) == 0
        files = {
            str(p.relative_to(target)): p.stat().st_size
            for p in target.rglob("*")
            if p.suffix in (".pt", ".safetensors")
        }
        writes = told["writes"]
        assert isinstance(writes, dict)
        assert {file: entry["nbytes"] for file, entry in writes.items()} == files
        assert told["disk_bytes"] == sum(files.values())
        assert told["target"] == str(target)


def test_counts(make_model: MakeModel, tmp_path: Path) -> None:
    """By hand: without a cut everything is copied whole but what is fused (5 layers: q k v weight and bias, gate and
    up; 3 vision layers: two qkv that are dealt out anew, gate and up with biases)."""
    hf = make_model()
    one = QWEN.prepare_hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),)))
    told = forecast(one, workers=1)
    joined = 5 * 3 + 3 * 4
    assert told.tensors == {"copied": len(one.plan.targets) - joined, "cut": 0, "joined": joined}
    assert (told.compared, told.target_exists, told.source_tensors) == (0, False, len(one.plan.sources))
    assert told.read_bytes == one.plan.nbytes


def test_copies_to_compare_are_told(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), tp_size=2))
    told = forecast(QWEN.prepare_mm_to_hf(tmp_path / "mm", hf, tmp_path / "back", layout=None))
    # Two norms a layer of either part, two row-parallel biases a vision layer, the patch embedding, the final norm, the
    # merger's norm and its second bias: each rank has a copy.
    assert told.compared == 5 * 2 + 3 * 4 + 4


def test_words(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, mm = make_model(), tmp_path / "mm"
    mm.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 58, 42))
    assert main(["plan", *hf_to_mm(hf, mm, tp=2)]) == 0
    out = capsys.readouterr().out
    for words in (
        "nothing was written",
        "105 tensors in 2 files",
        "which exists: --overwrite",
        "mp_rank_01_001",
        "every source byte used, every target byte made once",
        "42 free: too small",
        "MiB with",
    ):
        assert words in out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert main(["plan", *hf_to_mm(hf, mm, tp=2)]) == 0
    assert "unknown free" in capsys.readouterr().out


def test_what_does_not_fit_is_said_as_in_the_conversion(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *hf_to_mm(make_model(), tmp_path / "mm", tp=3)]) == 2
    assert "tp_size 3 does not divide num_key_value_heads, 4" in capsys.readouterr().err


def test_json_is_for_plans(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*hf_to_mm(make_model(), tmp_path / "mm"), "--json"])
    assert stop.value.code == 2
    assert not (tmp_path / "mm").exists()


def test_a_72b_model_needs_headers_alone_and_little_memory(tmp_path: Path) -> None:
    hf = published_models.save(tmp_path / "hf", "72B", shards=38)
    # The layout that the vendor documents for this model.
    line = hf_to_mm(hf, tmp_path / "mm", "[[6,11,11,11,11,11,11,8]]", "[[32,0,0,0,0,0,0,0]]", 2)
    code, peak, heavy = child(["plan", *line])
    assert (code, heavy) == (0, [])
    assert peak < 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
