"""The script of fixes: read by bash, never trusted by it. No step that could change this machine is run here."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_envcheck import Finding, Report, Severity, Snapshot, check, cli, say
from ascend_envcheck.fix import DOWNLOADS, ELSEWHERE, HAS_PLACEHOLDER, NEEDS_ROOT, NOT_KNOWN, Step, steps
from ascend_envcheck.render.fix_script import script
from ascend_envcheck.rules import packs
from ascend_envcheck.rules.rule import source_command
from ascend_envcheck.snapshot import Distribution, HostFacts, ImportFacts

BEFORE = Snapshot(
    distributions={"torch": Distribution("2.5.0+cpu"), "torchvision": Distribution("0.20.0")},
    variables={"HCCL_CONNECT_TIMEOUT": "120", "LD_LIBRARY_PATH": "~/lib:/usr/lib", "HCCL_IF_IP": "ip4-0123abcd"},
    host=HostFacts(live=True, reserved_ports="8080", limits={"nofile": 1024, "memlock": 65536}),
)


def finding(command: str, id_: str = "ID", cause: str = "cause", severity: Severity = Severity.FAIL) -> Finding:
    return Finding(id_, severity, cause, command, "source")


def step(command: str, snapshot: Snapshot = BEFORE) -> Step:
    (made,) = steps(Report((finding(command),), ()), snapshot)
    return made


def bash(text: str, *arguments: str, cwd: Path, stubs: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script with nothing on PATH but what is harmless."""
    path = cwd / "fix.sh"
    path.write_text(text)
    environ = {"PATH": f"{stubs}:/usr/bin:/bin" if stubs else "/usr/bin:/bin", "HOME": str(cwd), "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        ["bash", str(path), *arguments], cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=30
    )


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Programs that only write down how they were called."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name in ("pip", "rm", "sudo"):
        (folder / name).write_text(
            f'#!/bin/sh\nprintf "%s|" {name} "$@" >> "{tmp_path}/called"; echo >> "{tmp_path}/called"\n'
        )
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("command", "undo"),
    [
        (
            "pip install torch==2.6.0 torch_npu==2.6.0",
            (
                "pip uninstall -y torch_npu",
                "pip install --no-deps torch==2.5.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu",
            ),
        ),
        (
            "pip install torch==2.6.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu   # or yours",
            ("pip install --no-deps torch==2.5.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu",),
        ),
        ("pip install --no-deps 'torchvision==0.21.*'", ("pip install --no-deps torchvision==0.20.0",)),
        ("pip uninstall -y torchvision", ("pip install --no-deps torchvision==0.20.0",)),
        ("pip install psutil", ("pip uninstall -y psutil",)),
        ("pip install of-which-nobody-wrote-down", ()),
        ("export HCCL_CONNECT_TIMEOUT=600", ("export HCCL_CONNECT_TIMEOUT=120",)),
        ("unset HCCL_CONNECT_TIMEOUT", ("export HCCL_CONNECT_TIMEOUT=120",)),
        ("export TORCH_DEVICE_BACKEND_AUTOLOAD=0   # CPU only then", ("unset TORCH_DEVICE_BACKEND_AUTOLOAD",)),
        ("export LD_LIBRARY_PATH=/a:$LD_LIBRARY_PATH", ('export LD_LIBRARY_PATH="$HOME"/lib:/usr/lib',)),
        ("export HCCL_IF_IP=1.2.3.4", ()),  # the value was hidden: it can't be brought back
        ("export OF_WHICH_NOBODY_WROTE_DOWN=1", ()),
        ("source /usr/local/Ascend/cann/set_env.sh", ()),
        ("ulimit -n 65535   # lasting: /etc/security/limits.conf", ("ulimit -S -n 1024",)),
        ("ulimit -l unlimited", ()),
    ],
)
def test_ready_steps_and_their_undo(command: str, undo: tuple[str, ...]) -> None:
    made = step(command)
    assert made.held == ""
    assert made.undo == undo


@pytest.mark.parametrize(
    ("command", "reason", "undo"),
    [
        (
            "sudo sysctl -w net.ipv4.ip_local_reserved_ports=60000-60031",
            NEEDS_ROOT,
            ("sudo sysctl -w net.ipv4.ip_local_reserved_ports=8080",),
        ),
        ("sudo sysctl -w vm.swappiness=1", NEEDS_ROOT, ()),
        (
            'sudo usermod -aG HwHiAiUser "$USER"   # then log in again',
            NEEDS_ROOT,
            ('sudo gpasswd -d "$USER" HwHiAiUser',),
        ),
        ("./Ascend-cann-toolkit_8.2.RC1_linux-aarch64.run --install", DOWNLOADS, ()),
        ("wget https://example.org/x.tar", DOWNLOADS, ()),
        ("docker run --device /dev/davinci0 IMAGE", ELSEWHERE, ()),
        ("conda create -y -n ascend python=3.11 && conda activate ascend", ELSEWHERE, ()),
        ("ulimit -n $(rm x)", NOT_KNOWN, ()),
        ("export HCCL_SOCKET_IFNAME=<interface>", HAS_PLACEHOLDER, ()),
        ("pip install …", HAS_PLACEHOLDER, ()),
        ("pip install -r FILE", HAS_PLACEHOLDER, ()),
        ("dmesg | tail", NOT_KNOWN, ()),
        ("env | grep -E '^(ASCEND|LD_LIBRARY_PATH)' | tr ':' '\\n'", NOT_KNOWN, ()),
        ("pip install torch; rm -rf ~", NOT_KNOWN, ()),
        ("pip install torch && rm -rf ~", NOT_KNOWN, ()),
        ("pip install `rm x`", NOT_KNOWN, ()),
        ("pip install $(rm x)", NOT_KNOWN, ()),
        ("pip install torch > /home/ada/.bashrc", NOT_KNOWN, ()),
        ("pip install torch\nrm -rf ~", NOT_KNOWN, ()),
        ("pip install 'not closed", NOT_KNOWN, ()),
        ("pip install --index-url http://unencrypted torch", NOT_KNOWN, ()),
        ("export X=$(rm x)", NOT_KNOWN, ()),
        ("export X=`rm x`", NOT_KNOWN, ()),
        ("export X=1 Y=2", NOT_KNOWN, ()),
        ("export 1X=1", NOT_KNOWN, ()),
        ("source relative.sh", NOT_KNOWN, ()),
        ("python -c 'import torch'", NOT_KNOWN, ()),
    ],
)
def test_held_steps(command: str, reason: str, undo: tuple[str, ...], tmp_path: Path, stubs: Path) -> None:
    made = step(command)
    assert (made.held, made.undo) == (reason, undo)
    text = script(Report((finding(command),), ()), BEFORE)
    for verb in ("run", "undo"):
        done = bash(text, verb, "ID", cwd=tmp_path, stubs=stubs)
        assert done.returncode != 0
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "called").exists()


def test_without_arguments_it_lists_and_runs_nothing(tmp_path: Path, stubs: Path) -> None:
    findings = (
        finding("pip install torch==2.6.0", "TORCH", "torch is old"),
        finding("sudo reboot", "DRIVER", "driver is old"),
        finding("export HCCL_CONNECT_TIMEOUT=600", "HCCL", "short", Severity.WARN),
        finding("pip install nothing", "INFO", severity=Severity.INFO),
    )
    text = script(Report(findings, ()), BEFORE)
    done = bash(text, cwd=tmp_path, stubs=stubs)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^([A-Z]+)  ", done.stdout, re.MULTILINE) == ["TORCH", "DRIVER", "HCCL"]
    assert "commented out: needs root" in done.stdout
    assert f"usage: {tmp_path}/fix.sh run ID" in done.stdout
    for wrong in (("run",), ("run", "NONE"), ("TORCH",), ("run", "INFO"), ("all", "TORCH")):
        assert bash(text, *wrong, cwd=tmp_path, stubs=stubs).returncode == 2
    assert not (tmp_path / "called").exists()


def test_a_step_and_its_undo_call_pip(tmp_path: Path, stubs: Path) -> None:
    report = Report((finding("pip install 'torch>=2.6' torch_npu==2.6.0", "TORCH-NPU"),), ())
    text = script(report, BEFORE)
    assert bash(text, "run", "TORCH-NPU", cwd=tmp_path, stubs=stubs).returncode == 0
    assert (tmp_path / "called").read_text() == "pip|install|torch>=2.6|torch_npu==2.6.0|\n"
    (tmp_path / "called").unlink()
    assert bash(text, "undo", "TORCH-NPU", cwd=tmp_path, stubs=stubs).returncode == 0
    index = "--extra-index-url|https://download.pytorch.org/whl/cpu"
    again = f"pip|install|--no-deps|torch==2.5.0+cpu|{index}|"
    assert (tmp_path / "called").read_text() == f"pip|uninstall|-y|torch_npu|\n{again}\n"


def test_the_undo_brings_back_what_pip_would_not_put_together() -> None:
    """The wheels of torch_npu ask for one torch; and a build for CUDA is on PyTorch's own index alone."""
    parted = {"torch": Distribution("2.6.0+cu124"), "torch_npu": Distribution("2.7.1")}
    made = step("pip install torch==2.6.0 torch_npu==2.6.0", replace(BEFORE, distributions=parted))
    (undo,) = made.undo
    assert undo.startswith("pip install --no-deps torch==2.6.0+cu124 torch_npu==2.7.1 ")
    assert undo.endswith(" --extra-index-url https://download.pytorch.org/whl/cu124")


def test_a_variable_is_printed_for_the_calling_shell(tmp_path: Path) -> None:
    report = Report((finding("export LD_LIBRARY_PATH=~/new:$LD_LIBRARY_PATH", "PATH"),), ())
    text = script(report, BEFORE)
    bash(text, cwd=tmp_path)
    for verb, expected in (("run", f"{tmp_path}/new:/old"), ("undo", f"{tmp_path}/lib:/usr/lib")):
        line = f'LD_LIBRARY_PATH=/old; eval "$(bash {tmp_path}/fix.sh {verb} PATH)"; echo "$LD_LIBRARY_PATH"'
        done = subprocess.run(
            ["bash", "-c", line], env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == (f"{expected}\n", "")


HOSTILE_HOME = "/x; rm -rf $HOME #"


def hostile(text: str) -> Report:
    return Report(
        (
            Finding("CANN", Severity.FAIL, f"{text} is not sourced", source_command(f"{text}/set_env.sh"), text),
            Finding("PIP", Severity.FAIL, text, f"pip install torch=={text}", text),
            Finding("VAR", Severity.WARN, text, f"export X={text}", text),
            Finding("QUOTED", Severity.WARN, text, f"export X={shlex.quote(text)}", text),
            Finding(text, Severity.WARN, text, "pip install psutil", text),
            Finding("BARE", Severity.WARN, text, text, text),
        ),
        (),
    )


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE_HOME,
        "a\nrm -rf $HOME\n#",
        "a'\nrm -rf $HOME\n'",
        '"; rm -rf "$HOME"; "',
        "$(rm -rf $HOME)",
        "`rm -rf $HOME`",
        "}; rm -rf $HOME; {",
        "END\nrm -rf $HOME",
        "a\rrm -rf $HOME",
        "*) rm -rf $HOME ;;",
        "\\\nrm -rf $HOME",
        "~/$(rm x)",
        "\u2028rm x",
    ],
)
def test_what_a_snapshot_says_is_never_run(text: str, tmp_path: Path, stubs: Path) -> None:
    snapshot = replace(
        BEFORE,
        variables={"LD_LIBRARY_PATH": text, "X": text},
        distributions={"torch": Distribution(text), "psutil": Distribution(text)},
        tool_version=text,
        files={"/proc/sys/vm/x": text},
    )
    more = (finding("export LD_LIBRARY_PATH=/a", "LD"), finding("sudo sysctl -w vm.x=1", "SYS"))
    report = Report((*hostile(text).findings, *more), ())
    source = script(report, snapshot)
    checked = subprocess.run(["bash", "-n"], input=source, capture_output=True, text=True, timeout=30)
    assert (checked.returncode, checked.stderr) == (0, "")
    calls = [(), *((verb, made.id) for made in steps(report, snapshot) for verb in ("run", "undo"))]
    for arguments in calls:
        done = bash(source, *arguments, cwd=tmp_path, stubs=stubs)
        if arguments and done.returncode == 0:  # what the user's shell would be given
            environ = {"PATH": f"{stubs}:/usr/bin:/bin", "HOME": str(tmp_path)}
            evaluated = done.stdout.replace("source ", "true ")
            subprocess.run(["bash", "-c", evaluated], env=environ, capture_output=True, timeout=30)
    called = (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
    assert {line.split("|")[0] for line in called.splitlines()} <= {"pip"}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_bash_reads_whatever_a_snapshot_says(text: str) -> None:
    """Every line of the script is one that we wrote: no text starts a line of its own."""
    source = script(hostile(text), replace(BEFORE, variables={"X": text}, tool_version=text))
    own = re.compile(
        r"#|set -euo|\w+\(\) \{|\}|case |esac|\Z|"
        r"    (#|printf|return|refuse |say |echo |pip |run:|undo:|:\) |\*\) )"
    )
    assert [line for line in source.split("\n") if not own.match(line)] == []
    assert all(character.isprintable() or character == "\n" for character in source)


def test_each_command_once_and_each_step_an_id_of_its_own() -> None:
    findings = (
        finding("pip install a", "A"),
        finding("pip install a", "B"),
        finding("pip install b", "A"),
        finding("", "C"),
        finding("pip install c", "A-2"),
    )
    made = steps(Report(findings, ()), BEFORE)
    assert [(each.id, each.do) for each in made] == [
        ("A", "pip install a"),
        ("A-2", "pip install b"),
        ("A-2-2", "pip install c"),
    ]


def test_it_speaks_chinese(tmp_path: Path) -> None:
    report = Report((Finding("A", Severity.FAIL, say("old", "过旧"), "sudo reboot", "x"),), ())
    done = bash(script(report, BEFORE, "zh"), cwd=tmp_path)
    assert "过旧" in done.stdout
    assert "需要 root 权限" in done.stdout


PACK = {
    "schema_version": 1,
    "rules": [
        {
            "id": "OUR-PSUTIL",
            "title": "psutil is installed",
            "severity": "FAIL",
            "when": {"distribution": "psutil", "installed": False},
            "cause": "psutil is missing",
            "command": "pip install psutil",
            "source": "https://example.org",
        }
    ],
}


def call(folder: Path, snapshot: Snapshot) -> list[str]:
    """The command with one rule only, on a snapshot in a file."""
    (folder / "machine.json").write_text(snapshot.to_json())
    (folder / "pack.json").write_text(json.dumps(PACK))
    return ["fix", "--from", str(folder / "machine.json"), "--rules", str(folder / "pack.json"), "--lang", "en"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "RULES", ())
    target = tmp_path / "out.sh"
    arguments = [*call(tmp_path, BEFORE), "--emit", str(target)]
    assert cli.main([*arguments, "--profile", "train"]) == 0
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "steps: 1, of these commented out: 0." in streams.err
    assert "nothing was run" in streams.err
    text = target.read_text()
    assert "READ IT" in text
    assert "set -euo pipefail" in text
    assert "# OUR-PSUTIL: psutil is missing\n# source: https://example.org\n" in text
    assert "    pip install psutil\n" in text
    assert "    pip uninstall -y psutil\n" in text
    assert target.stat().st_mode & stat.S_IXUSR
    done = subprocess.run([str(target)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "OUR-PSUTIL" in done.stdout
    target.write_text("mine")
    assert cli.main(arguments) == 2
    assert target.read_text() == "mine"
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert target.read_text() == text


def test_nothing_to_do_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "RULES", ())
    fit = replace(BEFORE, distributions={"psutil": Distribution("7.0.0")})
    assert cli.main([*call(tmp_path, fit), "--emit", str(tmp_path / "fix.sh")]) == 0
    assert not (tmp_path / "fix.sh").exists()


def test_a_machine_without_torch_gets_a_script_that_bash_reads(tmp_path: Path) -> None:
    snapshot = Snapshot(imports=ImportFacts(torch="missing", torch_npu="missing"))
    text = script(check(snapshot), snapshot)
    assert "IMPORT-TORCH" in text
    assert bash(text, cwd=tmp_path).returncode == 0


def test_a_bad_snapshot_leaves_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert cli.main(["fix", "--emit", str(tmp_path / "fix.sh"), "--from", str(bad)]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json"]
