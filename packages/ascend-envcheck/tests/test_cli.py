"""The command as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_machine import FakeMachine, healthy

from ascend_envcheck import RULES, Snapshot, cli

IDS = [rule.id for rule in RULES]


def command(
    *arguments: str, cwd: Path, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "ascend_envcheck", *arguments],
        cwd=cwd,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def saved(machine: FakeMachine, tmp_path: Path) -> Path:
    """The snapshot of a machine that can do all."""
    healthy(machine)
    path = tmp_path / "machine.json"
    path.write_text(machine.snapshot().to_json())
    return path


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == IDS
    assert all(line.split("  ")[-1].strip() for line in lines)


def test_check_from(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--from", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "this machine can fine-tune Qwen2.5-VL on CPU: yes (tiny models)"
    assert lines[-1].startswith("this machine can fine-tune Qwen2.5-VL on NPU: yes (by its versions and files; nothing")


def test_check_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--from", str(saved), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == 1
    assert {finding["id"] for finding in report["findings"]} == set(IDS)
    assert [(verdict["device"], verdict["answer"]) for verdict in report["verdicts"]] == [
        ("cpu", "yes"),
        ("npu", "yes"),
    ]


def test_only_and_skip(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--from", str(saved), "--json", "--only", "PY-VER, DEV-NODES", "--skip", "PY-VER"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [finding["id"] for finding in report["findings"]] == ["DEV-NODES"]
    assert {verdict["answer"] for verdict in report["verdicts"]} == {"not known"}


def test_findings_stand_most_severe_first_and_skips_share_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plain.json"
    facts = json.loads(Snapshot().to_json())
    facts["imports"].update(torch="missing")
    facts["npu_smi"].update(outcome="missing")
    path.write_text(json.dumps(facts))
    assert cli.main(["check", "--from", str(path)]) == 1
    out = capsys.readouterr().out
    kinds = [line[:4] for line in out.splitlines() if line[:4] in ("FAIL", "WARN", "INFO", "SKIP")]
    assert kinds == sorted(kinds, key=["FAIL", "WARN", "INFO", "SKIP"].index)
    assert "SKIP  DEV-NODES, NPU-SMI, CANN-HOME, CANN-SOURCED, NNAL-LIB, IMPORT-TORCH-NPU: no NPU was found\n" in out
    assert "\n                        run:    pip install torch " in out
    assert "\n                        source: https://pytorch.org" in out


def test_strict(saved: Path) -> None:
    facts = json.loads(saved.read_text())
    del facts["distributions"]["transformers"]
    saved.write_text(json.dumps(facts))
    assert cli.main(["check", "--from", str(saved)]) == 0
    assert cli.main(["check", "--from", str(saved), "--strict"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "schema_version"), ("\xff", "not a snapshot"), (None, "No such file")],
)
def test_a_bad_snapshot_is_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert cli.main(["check", "--from", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "bad.json" in error


def test_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--only", "TORCH-NPUS"]) == 2
    assert "did you mean TORCH-NPU?" in capsys.readouterr().err
    for arguments in (["check", "--import_seconds", "0"], ["check", "--import_seconds", "soon"], [], ["chekc"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2


def test_snapshot_to_a_file_that_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "collect", lambda **options: Snapshot(variables={"options": ",".join(sorted(options))}))
    path = tmp_path / "machine.json"
    assert cli.main(["snapshot", "-o", str(path)]) == 0
    assert Snapshot.from_json(path.read_text()).variables["options"] == "import_seconds,import_torch,progress"
    path.write_text("mine")
    assert cli.main(["snapshot", "-o", str(path)]) == 2
    assert path.read_text() == "mine"
    assert cli.main(["snapshot", "--output", str(path), "--overwrite"]) == 0
    assert path.read_text().startswith("{")
    assert list(tmp_path.iterdir()) == [path]


def test_snapshot_to_standard_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "collect", lambda **options: Snapshot())
    assert cli.main(["snapshot"]) == 0
    assert Snapshot.from_json(capsys.readouterr().out) == Snapshot()


def test_a_folder_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "collect", lambda **options: Snapshot())
    assert cli.main(["snapshot", "-o", str(tmp_path / "no" / "machine.json")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "collect", lambda **options: Snapshot())
    monkeypatch.setattr(Path, "replace", full)
    assert cli.main(["snapshot", "-o", str(tmp_path / "machine.json")]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (ZeroDivisionError, 3)])
def test_interruption_and_faults_of_ours(
    raised: type[BaseException], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> Snapshot:
        raise raised

    monkeypatch.setattr(cli, "collect", fail)
    assert cli.main(["check"]) == code
    error = capsys.readouterr().err
    assert error == "interrupted, nothing was written\n" if code == 130 else "ZeroDivisionError" in error


def test_torch_is_imported_only_when_a_chosen_rule_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def collect(**options: object) -> Snapshot:
        asked.append(options["import_torch"])
        return Snapshot()

    monkeypatch.setattr(cli, "collect", collect)
    cli.main(["check", "--only", "PY-VER"])
    cli.main(["check"])
    assert asked == [False, True]


def test_progress_is_told_to_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def collect(*, progress: object, **options: object) -> Snapshot:
        assert callable(progress)
        progress("importing torch")
        return Snapshot()

    monkeypatch.setattr(cli, "collect", collect)
    cli.main(["check"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["check"])
    assert capsys.readouterr().err == "\r\x1b[Kimporting torch …\r\x1b[K"


def test_a_real_machine_from_end_to_end(machine: FakeMachine, tmp_path: Path) -> None:
    """A plain CPU machine with torch is fit; so are its files a terminal without UTF-8."""
    machine.torch("2.13.0+cpu", "class accelerator:\n    is_available = staticmethod(lambda: False)\n")
    source = Path(cli.__file__).parents[1]
    environ = {"PYTHONPATH": f"{machine.site}{os.pathsep}{source}", "PYTHONIOENCODING": "ascii"}
    done = command("check", "--skip", "MM-PSUTIL,TORCHVISION", cwd=tmp_path, environ=environ)
    assert done.stderr == ""
    assert "IMPORT-TORCH      torch 2.13.0+cpu imports" in done.stdout
    assert done.returncode == 0


def test_a_reader_that_has_seen_enough(saved: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -m ascend_envcheck check --from "$1" | true', sys.executable, str(saved)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["snapshot", "--help"], ["list", "--help"]])
def test_help_costs_little(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ascend_envcheck.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'subprocess', 'importlib.metadata', 'csv'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage: ascend-envcheck" in done.stdout
