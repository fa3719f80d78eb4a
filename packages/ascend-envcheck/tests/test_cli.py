"""The command as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fake_machine import FakeMachine, healthy

from ascend_envcheck import RULES, Snapshot, cli, probes
from ascend_envcheck.commands import COMMANDS
from ascend_envcheck.rules.rule import GROUPS
from ascend_envcheck.snapshot import Distribution, ImportFacts

IDS = [rule.id for rule in RULES]
NAMES = ("check", "snapshot", "diff", "explain", "env", "matrix", "fix", "list", "schema")


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


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.setenv(name, "en_US.UTF-8")


@pytest.fixture
def saved(machine: FakeMachine, tmp_path: Path) -> Path:
    """The snapshot of a machine that can do all."""
    healthy(machine)
    path = tmp_path / "machine.json"
    path.write_text(machine.snapshot().to_json())
    return path


@pytest.fixture
def torchless(tmp_path: Path) -> Path:
    """The snapshot of a machine without torch, of which nothing else is known."""
    path = tmp_path / "plain.json"
    path.write_text(Snapshot(imports=ImportFacts(torch="missing")).to_json())
    return path


def pack(folder: Path, severity: str) -> Path:
    """A rule that finds something on every machine without the variable."""
    path = folder / "pack.json"
    rule = {
        "id": "OURS",
        "title": "all is well",
        "title_zh": "一切正常",
        "severity": severity,
        "when": {"variable": "LD_LIBRARY_PATH", "is_set": False},
        "cause": "it is not set",
        "cause_zh": "未设置",
        "command": "export LD_LIBRARY_PATH=/lib",
        "source": "https://example.org",
        "blocks": ["cpu"],
    }
    path.write_text(json.dumps({"schema_version": 1, "rules": [rule]}))
    return path


def with_pack(folder: Path, severity: str) -> list[str]:
    snapshot = folder / "empty.json"
    snapshot.write_text(Snapshot().to_json())
    return ["check", "--from", str(snapshot), "--rules", str(pack(folder, severity)), "--only", "OURS"]


def test_every_command_is_there() -> None:
    assert tuple(module.__name__.rpartition(".")[2].replace("listing", "list") for module in COMMANDS) == NAMES


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines if line.startswith("  ")) == sorted(IDS)
    headings = [line for line in lines if not line.startswith("  ")]
    assert headings == [title for group, title in GROUPS.items() if any(rule.group == group for rule in RULES)]
    assert all(re.split(r"\s{2,}", line.strip())[1] for line in lines if line.startswith("  "))


def test_check_from(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last lines answer the question: two tasks on two kinds of device."""
    cli.main(["check", "--from", str(saved)])
    lines = capsys.readouterr().out.splitlines()
    starts = [
        f"this machine can {task} on {device}: "
        for task in ("fine-tune Qwen2.5-VL", "run Wan2.1")
        for device in ("CPU", "NPU")
    ]
    assert all(line.startswith(start) for line, start in zip(lines[-4:], starts))
    assert re.fullmatch(r"\d+ FAIL, \d+ WARN, \d+ INFO, \d+ SKIP", lines[-5])


@pytest.mark.parametrize("task", ["train", "infer"])
def test_a_profile_gives_its_own_verdicts_only(task: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "--from", str(saved), "--json", "--profile", task])
    report = json.loads(capsys.readouterr().out)
    assert {verdict["task"] for verdict in report["verdicts"]} == {task}
    assert all(task in finding["tasks"] for finding in report["findings"])


def test_check_json_is_the_same_in_every_language(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = []
    for language in ("en", "zh"):
        cli.main(["check", "--from", str(saved), "--json", "--lang", language])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    report = json.loads(outs[0])
    assert report["schema_version"] == 2
    assert {finding["id"] for finding in report["findings"]} == set(IDS)
    assert [(verdict["task"], verdict["device"]) for verdict in report["verdicts"]] == [
        ("train", "cpu"),
        ("train", "npu"),
        ("infer", "cpu"),
        ("infer", "npu"),
    ]


def test_the_other_forms(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "--from", str(saved), "--sarif"])
    assert json.loads(capsys.readouterr().out)["version"] == "2.1.0"
    cli.main(["check", "--from", str(saved), "--junit"])
    assert ElementTree.fromstring(capsys.readouterr().out).tag == "testsuites"
    cli.main(["check", "--from", str(saved), "--markdown"])
    assert "\n* this machine can fine-tune" in capsys.readouterr().out


def test_only_and_skip(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "--from", str(saved), "--json", "--only", "PY-VER, DEV-NODES", "--skip", "PY-VER"])
    report = json.loads(capsys.readouterr().out)
    assert {finding["id"] for finding in report["findings"]} == {"DEV-NODES"}
    assert {verdict["answer"] for verdict in report["verdicts"]} == {"not known"}


def test_what_is_missing_stands_right_above_the_verdicts(torchless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "--from", str(torchless)])
    out = capsys.readouterr().out
    kinds = [line.split()[0] for line in out.splitlines() if re.match(r"\s*(FAIL|WARN|INFO|SKIP)  ", line)]
    assert kinds == sorted(kinds, key=["INFO", "SKIP", "WARN", "FAIL"].index)
    (skipped,) = (line for line in out.splitlines() if line.startswith("SKIP  no NPU was found: "))
    assert skipped.count(", ") > 1


@pytest.mark.parametrize(("severity", "plain", "strict"), [("FAIL", 1, 1), ("WARN", 0, 1), ("INFO", 0, 0)])
def test_exit_codes(severity: str, plain: int, strict: int, tmp_path: Path) -> None:
    arguments = with_pack(tmp_path, severity)
    assert cli.main(arguments) == plain
    assert cli.main([*arguments, "--strict"]) == strict


@pytest.mark.parametrize(
    ("environ", "arguments", "expected"),
    [
        ({"LANG": "zh_CN.UTF-8"}, [], "未设置"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, [], "it is not set"),
        ({"LANG": "zh_CN.UTF-8"}, ["--lang", "en"], "it is not set"),
        ({"LANG": "en_US.UTF-8"}, ["--lang", "zh"], "未设置"),
        ({"LANG": ""}, [], "it is not set"),
    ],
)
def test_language(
    environ: dict[str, str],
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.setenv(name, environ.get(name, ""))
    cli.main([*with_pack(tmp_path, "FAIL"), *arguments])
    out = capsys.readouterr().out
    assert expected in out
    assert ("本机能否" in out.splitlines()[-1]) == (expected == "未设置")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is missing"),
        ("\xff", "can't decode"),
        ("[" * 100_000, "not a snapshot"),
        (json.dumps({**json.loads(Snapshot().to_json()), "schema_version": 99}), "schema_version 99"),
        (None, "No such file"),
    ],
)
@pytest.mark.parametrize("arguments", [["check", "--from"], ["diff", "bad.json"], ["fix", "--emit", "x.sh", "--from"]])
def test_a_bad_snapshot_is_one_line(
    text: str | None,
    message: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("bad.json").write_bytes(text.encode("latin-1"))
    assert cli.main([*arguments, "bad.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "bad.json" in error
    assert message in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["chekc"],
        ["check", "--import_seconds", "-1"],
        ["check", "--import_seconds", "soon"],
        ["check", "--import_seconds", "nan"],
        ["check", "--profile", "both"],
        ["check", "--lang", "fr"],
        ["check", "--no-such-option"],
        ["diff"],
        ["diff", "one.json"],
        ["fix"],
        ["schema", "yaml"],
        ["snapshot", "file.json"],
    ],
)
def test_a_wrong_call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: ascend-envcheck" in capsys.readouterr().err


def test_standard_output_that_is_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a service that was started with ``>&-``: sys.stdout is None."""
    answering(monkeypatch)
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert cli.main(["schema"]) == 2
        assert cli.main(["snapshot", "-o", str(tmp_path / "machine.json")]) == 0
    assert capsys.readouterr().err == "error: standard output is closed\n"


def test_a_rule_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--only", "TORCH-NPUS"]) == 2
    assert "did you mean TORCH-NPU?" in capsys.readouterr().err
    assert cli.main(["check", "--only", "PY-VER", "--skip", "PY-VER"]) == 2
    assert "leave no rule" in capsys.readouterr().err


def answering(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> list[dict[str, Any]]:
    """Has `collect` answer at once; gives the options of its calls."""
    calls: list[dict[str, Any]] = []

    def collect(**options: Any) -> Snapshot:
        calls.append(options)
        return Snapshot(**facts)

    monkeypatch.setattr(probes, "collect", collect)
    return calls


def test_snapshot_to_a_file_that_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answering(monkeypatch, variables={"A": "1"})
    path = tmp_path / "machine.json"
    assert cli.main(["snapshot", "-o", str(path)]) == 0
    assert Snapshot.from_json(path.read_text()).variables == {"A": "1"}
    path.write_text("mine")
    assert cli.main(["snapshot", "-o", str(path)]) == 2
    assert path.read_text() == "mine"
    assert len(calls) == 1  # refused before the seconds of probing, not after
    assert cli.main(["snapshot", "--output", str(path), "--overwrite"]) == 0
    assert path.read_text().startswith("{")
    assert list(tmp_path.iterdir()) == [path]


def test_snapshot_to_standard_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answering(monkeypatch)
    assert cli.main(["snapshot"]) == 0
    assert Snapshot.from_json(capsys.readouterr().out) == Snapshot()


@pytest.mark.parametrize("arguments", [["snapshot", "-o"], ["fix", "--emit"]])
def test_a_folder_that_is_missing(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, imports=ImportFacts(torch="missing"))
    rules = ["--rules", str(pack(tmp_path, "FAIL"))] if arguments[0] == "fix" else []
    before = sorted(tmp_path.iterdir())
    assert cli.main([*arguments, str(tmp_path / "no" / "machine"), *rules]) == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("arguments", [["snapshot", "-o"], ["fix", "--emit"]])
def test_a_write_that_fails_leaves_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    answering(monkeypatch)
    rules = ["--rules", str(pack(tmp_path, "FAIL"))] if arguments[0] == "fix" else []
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Path, "replace", full)
    assert cli.main([*arguments, str(tmp_path / "machine.json"), *rules]) == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (ZeroDivisionError, 3)])
@pytest.mark.parametrize("name", ["check", "snapshot", "fix"])
def test_interruption_and_faults_of_ours(
    name: str,
    raised: type[BaseException],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**options: object) -> Snapshot:
        raise raised

    monkeypatch.setattr(probes, "collect", fail)
    target = {"check": [], "snapshot": ["-o", str(tmp_path / "x")], "fix": ["--emit", str(tmp_path / "x")]}[name]
    assert cli.main([name, *target]) == code
    error = capsys.readouterr().err
    assert error == "interrupted, nothing was written\n" if code == 130 else "ZeroDivisionError" in error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_process_says_so_and_writes_nothing(machine: FakeMachine, tmp_path: Path) -> None:
    """Ctrl-C while torch is being imported in the child process."""
    machine.torch("2.7.1", f"open({str(tmp_path / 'importing')!r}, 'w').close()\nimport time\ntime.sleep(60)\n")
    target = tmp_path / "out.json"
    environ = {**os.environ, "PYTHONPATH": f"{machine.site}{os.pathsep}{Path(cli.__file__).parents[1]}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ascend_envcheck", "snapshot", "-o", str(target)],
        cwd=tmp_path,
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "importing").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "interrupted, nothing was written\n")
    assert not target.exists()


def test_torch_is_imported_only_when_a_chosen_rule_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answering(monkeypatch)
    cli.main(["check", "--only", "PY-VER"])
    cli.main(["check"])
    assert [call["import_torch"] for call in calls] == [False, any(rule.needs_import for rule in RULES)]


def test_how_to_look_is_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = answering(monkeypatch)
    hosts = tmp_path / "hosts"
    hosts.write_text("# nodes\n10.0.0.1 slots=8\n\n10.0.0.2  # the second\n")
    cli.main(["check", "--root", str(tmp_path), "--smoke", "--peers", str(hosts), "--import_seconds", "7"])
    (call,) = calls
    assert (call["root"], call["smoke"], call["import_seconds"]) == (str(tmp_path), True, 7)
    assert call["peers"] == ("10.0.0.1", "10.0.0.2")
    assert cli.main(["check", "--peers", str(tmp_path / "none")]) == 2


def test_no_seconds_mean_no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answering(monkeypatch)
    for name in (["check"], ["snapshot"]):
        cli.main([*name, "--import_seconds", "0"])
    assert [call["import_torch"] for call in calls] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--root", "no-such-folder"], "no-such-folder: there is no such folder"),
        (["--root", "a-file"], "a-file: there is no such folder"),
        (["--from", "a-file", "--root", "."], "--from judges a snapshot"),
        (["--from", "a-file", "--smoke"], "--from judges a snapshot"),
        (["--from", "a-file", "--peers", "hosts"], "--from judges a snapshot"),
        (["--smoke", "--import_seconds", "0"], "--smoke computes with torch"),
        (["--peers", "hosts"], "hosts:2: '--help' is no address"),
        (["--peers", "binary"], "binary:1: "),
    ],
)
@pytest.mark.parametrize("command", [["check"], ["fix", "--emit", "out.sh"]])
def test_options_that_could_not_be_meant(
    arguments: list[str],
    words: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A verdict on something else than what was asked for would be worse than none."""
    calls = answering(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text(Snapshot().to_json())
    Path("hosts").write_text("10.0.0.1\n--help\n")
    Path("binary").write_bytes(b"\xff\x00\xfe")
    assert cli.main([*command, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not calls


@pytest.mark.parametrize("name", ["", "check", "snapshot", "diff", "explain", "env", "matrix", "fix", "list", "schema"])
def test_every_terminal_can_show_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse writes it as it stands: to a terminal of the C locale, another character is a traceback."""
    with pytest.raises(SystemExit):
        cli.main([*([name] if name else []), "--help"])
    assert capsys.readouterr().out.isascii()


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root could rename a file over /dev/null."""
    answering(monkeypatch)
    pipe, link, text = tmp_path / "pipe", tmp_path / "link", tmp_path / "text"
    os.mkfifo(pipe)
    for target in (pipe, tmp_path):
        assert cli.main(["snapshot", "-o", str(target), "--overwrite"]) == 2
        assert "no regular file" in capsys.readouterr().err
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    text.write_text("mine")
    link.symlink_to(text)
    assert cli.main(["snapshot", "-o", str(link), "--overwrite"]) == 0
    assert link.is_symlink()
    assert text.read_text().startswith("{")
    assert sorted(tmp_path.iterdir()) == [link, pipe, text]


def test_progress_is_told_to_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def collect(*, progress: Any, **options: object) -> Snapshot:
        progress("importing torch")
        return Snapshot()

    monkeypatch.setattr(probes, "collect", collect)
    cli.main(["check"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["check"])
    assert capsys.readouterr().err == "\r\x1b[Kimporting torch …\r\x1b[K"


def test_a_hostile_snapshot_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hostile.json"
    odd = "\x1b[2J\r\nthis machine can fine-tune Qwen2.5-VL on NPU: yes"
    path.write_text(
        Snapshot(
            imports=ImportFacts(torch="failed", torch_detail=odd, torch_npu="failed", torch_npu_detail=odd),
            distributions={"torch": Distribution(odd), "torch_npu": Distribution(odd)},
            devices={"/dev/davinci0": odd},
            cann_homes=(odd,),
            tool_version=odd,
        ).to_json()
    )
    for language in ("en", "zh"):
        assert cli.main(["check", "--from", str(path), "--lang", language]) in (0, 1)
        out = capsys.readouterr().out
        assert all(character.isprintable() or character == "\n" for character in out)
        assert "this machine can fine-tune Qwen2.5-VL on NPU: yes" not in out.splitlines()


def test_a_real_machine_from_end_to_end(machine: FakeMachine, tmp_path: Path) -> None:
    """Torch is imported in a child, a terminal without UTF-8 is no obstacle, and nothing is written."""
    machine.torch("2.13.0+cpu", "class accelerator:\n    is_available = staticmethod(lambda: False)\n")
    machine.without_site_packages()
    (machine.site / "ascend_envcheck").symlink_to(Path(cli.__file__).parent)  # which is hidden where it is installed
    environ = {"PYTHONPATH": str(machine.site), "PYTHONIOENCODING": "ascii"}
    before = sorted(tmp_path.rglob("*"))
    done = command("check", "--lang", "zh", cwd=tmp_path, environ={**environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.stderr == ""
    assert "torch 2.13.0+cpu" in done.stdout
    assert done.returncode in (0, 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reader_that_has_seen_enough(saved: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -m ascend_envcheck check --from "$1" | true', sys.executable, str(saved)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


HEAVY = {
    "torch",
    "subprocess",
    "importlib.metadata",
    "csv",
    "configparser",
    "platform",
    "xml",
    "concurrent.futures",
}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in NAMES)])
def test_help_costs_little(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom ascend_envcheck.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as stop: assert not stop.code, stop\n"
        f"heavy = {HEAVY!r} & (set(sys.modules) - before)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("usage: ascend-envcheck" in done.stdout) == (arguments != ["--version"])
