"""The command: what can be used here, measuring beforehand, and what a tuning file holds."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dit_fused_ops import capabilities, dispatcher, rotary_position_embedding
from dit_fused_ops.cases import SHAPES, TUNED, cases, parse_shape
from dit_fused_ops.cli import main
from dit_fused_ops.dispatch.store import read_decisions
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.table import OPS

TINY = "1x33x2x16"


def run(*arguments: str) -> int:
    return main(list(arguments))


def test_capabilities_name_every_backend_and_give_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("capabilities") == 0
    shown = capsys.readouterr().out
    for op in OPS:
        assert f"\n{op.name}\n" in f"\n{shown}"
    reasons = {(each.op, each.backend): each.reason for each in capabilities()}
    assert reasons[("rotary_position_embedding", "eager")] is None
    assert "runs on npu" in str(reasons[("rotary_position_embedding", "npu_rotary_mul")])


def test_capabilities_as_json_hold_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("capabilities", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["op"], row["backend"]) for row in rows] == [(each.op, each.backend) for each in capabilities()]


def test_tuning_beforehand_leaves_nothing_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "shipped.json"
    assert run("tune", "--shapes", TINY, "--dtype", "float32", "--device", "cpu", "--quick", "--file", str(file)) == 0
    kept = file.read_bytes()
    ops = {key.partition(" | ")[0] for key in read_decisions(file)}
    assert ops == {op.name for op in OPS if any(key.startswith(f"{op.name} |") for key in read_decisions(file))}
    assert {"rotary_position_embedding", "attention_forward", "norm", "multiply_add"} <= ops
    x, angles = torch.randn(1, 33, 2, 16), torch.randn(33, 8)
    with torch.no_grad(), dispatcher.configured(mode="runtime", file=file):
        rotary_position_embedding(x, angles.cos(), angles.sin())
    assert file.read_bytes() == kept, "it was measured again"
    assert "rotary_position_embedding half" in capsys.readouterr().err


def test_tuning_as_json_says_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "--shapes",
        TINY,
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--quick",
        "--file",
        str(tmp_path / "t"),
        "--json",
    ]
    assert run("tune", *line) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["shape"] == TINY and row["microseconds"] for row in rows)
    rope = next(row for row in rows if row["op"] == "rotary_position_embedding")
    assert rope["moved_bytes"] == 2 * (33 * 2 * 16 * 2) + 2 * (33 * 8 * 4)
    cross = next(row for row in rows if row["what"] == "cross")
    assert cross["matmul_operations"] == 4 * 2 * 33 * 512 * 16


def test_some_ops_can_be_tuned_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--shapes", TINY, "--device", "cpu", "--quick", "--file", str(tmp_path / "t"), "--ops", "rms_norm"]
    assert run("tune", *line, "--json") == 0
    assert [row["op"] for row in json.loads(capsys.readouterr().out)] == ["rms_norm"]


def test_every_op_that_can_be_named_is_tuned() -> None:
    made = cases(parse_shape(TINY), torch.float32, torch.device("cpu"))
    assert {case.op for case in made} == set(TUNED)


def test_a_tuning_file_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "t.json")
    assert run("show", file) == 2
    assert f"{file} does not exist; `dit-fused-ops tune --file" in capsys.readouterr().err
    assert run("show") == 0
    assert run("tune", "--shapes", TINY, "--device", "cpu", "--quick", "--file", file) == 0
    capsys.readouterr()
    assert run("show", file) == 0
    assert "norm | " in capsys.readouterr().out
    assert run("show", file, "--json") == 0
    assert all(decision["ranking"] for decision in json.loads(capsys.readouterr().out).values())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["tune", "--shapes", "huge"], "shape is 'huge', legal are wan-1.3b-480p, .* such as 1x32760x12x128"),
        (["tune", "--shapes", "1x0x12x128"], "shape is '1x0x12x128'"),
        (["tune", "--shapes", "1x4x12x15"], "with an even HEAD_DIM"),
        (["tune", "--shapes", TINY, "--device", "cuda:9"], "device is 'cuda:9', and this machine has no such device"),
        (["tune", "--shapes", TINY, "--device", "toaster"], "device is 'toaster'"),
        (["tune", "--shapes", TINY, "--ops", "rope"], "ops hold rope, legal are rotary_position_embedding, attention"),
    ],
)
def test_bad_input_is_one_line_and_code_2(line: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    error = capsys.readouterr().err.splitlines()[0]
    assert re.search(said, error)


def test_a_corrupt_file_that_was_named_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.json").write_text("{", encoding="utf-8")
    for line in (["show"], ["tune", "--shapes", TINY, "--device", "cpu", "--quick", "--file"]):
        assert main([*line, str(tmp_path / "t.json")]) == 2
        assert "is not a tuning file" in capsys.readouterr().err
    assert (tmp_path / "t.json").read_text(encoding="utf-8") == "{"


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run("tune", "--shapes", TINY, "--device", "cpu", "--file", str(tmp_path / "file" / "t.json")) == 2
    assert "t.json: " in capsys.readouterr().err


def test_published_shapes_are_the_token_grids_of_81_frames() -> None:
    assert {name: shape.tokens for name, shape in SHAPES.items()} == {
        "wan-1.3b-480p": 32760, "wan-14b-480p": 32760, "wan-14b-720p": 75600
    }  # fmt: skip
    assert str(parse_shape("2x8x4x64")) == "2x8x4x64"
    with pytest.raises(ParametersInvalid, match="2x8x4"):
        parse_shape("2x8x4")


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from dit_fused_ops.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    line = ["tune", "--shapes", TINY, "1x8192x12x128", "--dtype", "float32", "--device", "cpu", "--quick"]
    command = [sys.executable, "-c", code, *line, "--file", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not file.exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "what was measured until now is kept" in said
    assert read_decisions(file)
