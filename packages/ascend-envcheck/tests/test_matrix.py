"""The command ``matrix`` as it is typed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import TABLE, FakeMachine, healthy

from ascend_envcheck import Snapshot, cli
from ascend_envcheck.commands.matrix import FIXABLE, versions_of
from ascend_envcheck.snapshot import OK, CommandFacts, Distribution, PythonFacts


def lines(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[str]:
    assert cli.main(["matrix", *arguments, "--lang", "en"]) == code
    return capsys.readouterr().out.splitlines()


def document(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, object]:
    assert cli.main(["matrix", *arguments, "--json"]) == code
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_row_a_build_newest_first(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [line.split() for line in lines(capsys, "--torch", "2.8.0")]
    assert shown[0] == ["fixed:", "torch", "2.8.0"]
    assert shown[1][:3] == ["torch", "torch_npu", "CANN"]
    # The builds of torch 2.8 as the vendor's table and tags have them, with CANN, status and confidence.
    assert [row[:5] for row in shown[2:]] == [
        ["2.8.0", "2.8.0.post5", "9.0.0", "patch", "derived"],
        ["2.8.0", "2.8.0.post4", "9.0.0", "general", "official"],
        ["2.8.0", "2.8.0.post3", "8.5.0", "patch", "derived"],
        ["2.8.0", "2.8.0.post2", "8.5.0", "general", "official"],
        ["2.8.0", "2.8.0.post1", "8.3.RC1", "patch", "derived"],
        ["2.8.0", "2.8.0", "8.3.RC1", "general", "official"],
        ["2.8.0", "2.8.0rc1", "8.3.RC1.alpha001", "pre-release", "official-history"],
    ]


def test_a_cann_shows_who_may_run_on_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(capsys, "--cann", "9.1.0", "--torch", "2.6.0")
    assert "2.6.0.post5" in "\n".join(shown)
    assert "9.1.0 (cross)" in "\n".join(shown)
    assert shown[-1].startswith("(cross): torch_npu was made for another CANN")


def test_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(capsys)
    assert shown[0].startswith("torch ")
    assert [line.split()[1] for line in shown[1:]].count("2.7.1.post2") == 1
    assert any(line.split()[:3] == ["2.14.0", "2.14.0", "?"] for line in shown)  # no source names its CANN


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_narrow_terminal_loses_the_last_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = lines(capsys, "--torch", "2.7.1")[1:]
    assert max(map(len, shown)) <= columns
    assert ("HDK" in shown[0]) == (columns == 200)
    assert shown[0].split()[:3] == ["torch", "torch_npu", "CANN"]


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ((), ("--solve",)):
        shown = lines(capsys, "--torch", "2.7.1", "--cann", "8.2.RC1", *more, code=1)
        assert shown[-1].startswith("torch 2.7.1 and CANN 8.2.RC1 do not fit together")
    assert document(capsys, "--torch", "2.7.1", "--cann", "8.2.RC1", code=1)["rows"] == []
    assert document(capsys, "--torch", "9.9.9", "--solve", code=1)["solutions"] == []


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["matrix", "--cann", "newest"]) == 2
    assert "'newest' is no version of CANN" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["matrix", "--cuda", "12"])
    assert stopped.value.code == 2


def test_solve_shows_the_set_and_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(capsys, "--torch", "2.6", "--cann", "8.2rc1", "--machine", "aarch64", "--soc", "910B2", "--solve")
    text = "\n".join(shown)
    assert shown[0] == "fixed: torch 2.6.0, CANN 8.2.RC1, SoC ascend910b, machine aarch64"
    assert "TorchNPU      7.1.0" in text
    assert "confidence: " in text
    assert "source: Ascend/pytorch COMPATIBILITY" in text
    steps = [
        "Ascend-cann-toolkit_8.2.RC1_linux-aarch64.run --install",
        "Ascend-cann-kernels-910b_8.2.RC1_linux-aarch64.run --install",
        "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
        "pip install torch==2.6.0 torch_npu==2.6.0 'torchvision==0.21.*'",
        "Ascend-cann-nnal_8.2.RC1_linux-aarch64.run --install",
        "source /usr/local/Ascend/nnal/atb/set_env.sh",
    ]
    places = [text.index(step) for step in steps]
    assert places == sorted(places)


def test_chinese(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["matrix", "--torch", "2.7.1", "--solve", "--lang", "zh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("已固定：torch 2.7.1")
    assert "置信度：official" in text
    assert "source /usr/local/Ascend/nnal/atb/set_env.sh" in text
    assert cli.main(["matrix", "--torch", "2.7.1", "--lang", "zh"]) == 0
    assert "状态" in capsys.readouterr().out.splitlines()[1]


def test_json_is_the_same_in_both_languages(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for language in ("en", "zh"):
        assert cli.main(["matrix", "--torch", "2.7.1", "--solve", "--json", "--lang", language]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    found = json.loads(texts[0])
    assert (found["schema_version"], found["fixed"], found["why"]) == (1, {"torch": "2.7.1"}, "")
    assert found["solutions"][0]["torch_npu"] == "2.7.1.post8"
    assert {"title", "commands", "why"} == set(found["solutions"][0]["install"][0])
    row = json.loads(json.dumps(document(capsys, "--torch_npu", "2.7.1.post2", "--cann", "8.5.0")["rows"]))[0]
    assert (row["cann"], row["exact"], row["python_wheels"]) == ("8.5.0", True, ["3.9", "3.10", "3.11", "3.12"])


SEEN = replace(
    Snapshot(),
    python=PythonFacts(version="3.10.14", machine="aarch64"),
    distributions={"torch": Distribution("2.7.1"), "torch_npu": Distribution("2.7.1.post2")},
    cann_homes=("/usr/local/Ascend/ascend-toolkit/latest",),
    files={
        "/usr/local/Ascend/ascend-toolkit/latest/runtime/version.info": "Version=8.2.0.0.201\nversion_dir=8.2.RC1\n",
        "/usr/local/Ascend/driver/version.info": "Version=25.2.0\npackage_version=25.2.3\n",
    },
    commands={"npu-smi info": CommandFacts(OK, "", TABLE)},
)


def test_what_a_machine_fixes() -> None:
    assert versions_of(SEEN) == {
        "torch": "2.7.1",
        "torch_npu": "2.7.1.post2",
        "cann": "8.2.RC1",
        "python": "3.10.14",
        "hdk": "25.2.3",
        "machine": "aarch64",
        "soc": "ascend910b",
    }
    assert versions_of(Snapshot()) == {}
    assert set(versions_of(SEEN)) <= set(FIXABLE)


def test_from_a_snapshot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A torch that nobody built for this CANN: said so, and what was given on the line counts more."""
    path = tmp_path / "machine.json"
    path.write_text(SEEN.to_json())
    shown = lines(capsys, "--from", str(path), "--solve", code=1)
    assert shown[-1].startswith("torch 2.7.1 and CANN 8.2.RC1 do not fit together")
    better = lines(capsys, "--from", str(path), "--torch", "2.6.0", "--torch_npu", "2.6.0", "--solve")
    assert any("torch_npu     2.6.0 (general, made for this CANN)" in line for line in better)


def test_what_a_machine_has_that_no_table_knows_stays_open(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    strange = replace(SEEN, distributions={"torch": Distribution("9.0.0"), "torch_npu": Distribution("who knows")})
    path.write_text(strange.to_json())
    shown = lines(capsys, "--from", str(path), "--solve")
    assert "torch 9.0.0 is here, but not in the tables" in shown[1]
    assert "torch_npu who knows is here, but not in the tables" in shown[2]
    assert any("torch_npu     2.6.0 (general" in line for line in shown)  # the newest for CANN 8.2.RC1


def test_here_looks_at_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, machine: FakeMachine
) -> None:
    healthy(machine)
    seen = machine.snapshot()
    asked_for: dict[str, object] = {}

    def collect(**options: object) -> Snapshot:
        asked_for.update(options)
        return seen

    monkeypatch.setattr("ascend_envcheck.probes.collect", collect)
    shown = lines(capsys, "--here", "--solve", "--python", "3.10", "--machine", "aarch64")
    assert asked_for["import_torch"] is False
    assert any(line.split() == ["CANN", "8.2.RC1"] for line in shown)
    assert any("torch_npu     2.6.0 (general, made for this CANN)" in line for line in shown)


def test_a_file_that_is_no_snapshot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "no.json"
    path.write_text("[]")
    assert cli.main(["matrix", "--from", str(path)]) == 2
    assert "no.json" in capsys.readouterr().err
