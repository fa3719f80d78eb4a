"""``env`` prints what a shell can take, in every form, and the profile says why."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from test_variables import A2, A3, machine_with

from ascend_envcheck.cli import main
from ascend_envcheck.commands.env import fish_quoted
from ascend_envcheck.findings import TASKS
from ascend_envcheck.messages import CHINESE, told
from ascend_envcheck.profiles import Entry, env_profile
from ascend_envcheck.snapshot import Snapshot

# What the practitioner of the walk-through exports before training.
WALKTHROUGH = {
    "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
    "TASK_QUEUE_ENABLE": "2",
    "COMBINED_ENABLE": "1",
    "CPU_AFFINITY_CONF": "1",
    "HCCL_CONNECT_TIMEOUT": "1200",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
}


def values(entries: tuple[Entry, ...]) -> dict[str, str]:
    return {entry.name: entry.value for entry in entries if entry.value}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["env", *arguments]) == 0
    return capsys.readouterr().out


def test_the_walk_through_is_in_the_profile() -> None:
    train = values(env_profile("train"))
    assert WALKTHROUGH.items() <= train.items()
    assert next(iter(train)) == "TASK_QUEUE_ENABLE"  # the most important first
    assert train["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in values(env_profile("infer"))


@pytest.mark.parametrize("task", TASKS)
def test_each_entry_says_why(task: str) -> None:
    entries = env_profile(task)
    assert len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.why != told(entry.why, CHINESE)
        assert entry.source
        assert entry.advice
        assert bool(entry.value) != bool(entry.fill)


def test_no_such_profile() -> None:
    with pytest.raises(ValueError, match="no profile 'all'; there are train and infer"):
        env_profile("all")


def test_the_machine_decides_on_some() -> None:
    old, new = machine_with(npu=A2, cann="8.2.RC1"), machine_with(npu=A3, cann="9.2.0")
    on_old, on_new = values(env_profile("infer", snapshot=old)), values(env_profile("infer", snapshot=new))
    assert "HCCL_OP_EXPANSION_MODE" not in on_old
    assert on_new["HCCL_OP_EXPANSION_MODE"] == "AIV"
    assert on_old["ASCEND_SLOG_PRINT_TO_STDOUT"] == on_new["ASCEND_LOG_PRINT_TO_STDOUT"] == "0"
    assert "ASCEND_LOG_PRINT_TO_STDOUT" not in on_old
    assert "ASCEND_SLOG_PRINT_TO_STDOUT" not in on_new
    assert "HCCL_OP_EXPANSION_MODE" not in values(env_profile("train", snapshot=new))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("spoken", ["en", "zh"])
def test_bash_takes_it(task: str, spoken: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--profile", task, "--lang", spoken)
    script = 'eval "$1"\nexec /usr/bin/env -0'
    done = subprocess.run(["/bin/bash", "-euc", script, "bash", text], env={}, stdout=subprocess.PIPE, check=True)
    seen = dict(line.split("=", 1) for line in done.stdout.decode().split("\0") if line)
    wanted = values(env_profile(task))
    assert {name: seen[name] for name in seen if name not in {"PWD", "SHLVL", "_", "OLDPWD"}} == wanted


def test_why_and_pitfalls_come_before(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--lang", "en").splitlines()
    at = lines.index("export TASK_QUEUE_ENABLE=2")
    assert lines[at - 2] == f"# {env_profile('train')[0].why}"
    assert lines[at - 1].startswith("# beware: 2 raises the peak of device memory")


def test_what_the_machine_must_know_is_a_comment(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--lang", "en").splitlines()
    at = lines.index("# export HCCL_SOCKET_IFNAME=")
    assert lines[at - 2].startswith("# fill in the network interface that reaches the other machines")


# Fish: words in single quotes; everything in it stands for itself, save \\ and \'.
def unquoted_by_fish(word: str) -> str:
    assert word[0] == word[-1] == "'"
    inner, out, at = word[1:-1], "", 0
    while at < len(inner):
        assert inner[at] != "'", "an unescaped quote would end the word"
        escaped = inner[at] == "\\" and inner[at + 1 : at + 2] in ("\\", "'")
        out += inner[at + escaped]
        at += 1 + escaped
    return out


@pytest.mark.parametrize("value", ["", "2", "a b", "it's", "\\", "\\'", "$HOME", "`x`", "(pwd)", "a\\nb", '"', "*;#"])
def test_fish_reads_back_what_was_quoted(value: str) -> None:
    assert unquoted_by_fish(fish_quoted(value)) == value


def test_fish(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--shell", "fish").splitlines()
    words = [line.split(" ") for line in lines if not line.startswith("#")]
    assert {tuple(line[:2]) for line in words} == {("set", "-gx")}
    assert {line[2]: unquoted_by_fish(line[3]) for line in words} == values(env_profile("train"))


def test_dotenv(capsys: pytest.CaptureFixture[str]) -> None:
    # docker run --env-file: NAME=value as it stands, lines that start with # are comments.
    lines = printed(capsys, "--shell", "dotenv", "--lang", "en").splitlines()
    seen = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert seen == values(env_profile("train"))
    assert lines[0] == f"# {env_profile('train')[0].why}"


def test_docker(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--shell", "docker")
    assert shlex.split(text) == text.split(), "an unquoted command substitution splits at blanks and reads no quotes"
    flags, settings = text.split()[::2], text.split()[1::2]
    assert set(flags) == {"-e"}
    assert dict(setting.split("=", 1) for setting in settings) == values(env_profile("train"))


def test_for_the_machine_of_a_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machine.json"
    file.write_text(machine_with(npu=A3).to_json())
    assert "HCCL_OP_EXPANSION_MODE=AIV" in printed(
        capsys, "--profile", "infer", "--shell", "docker", "--from", str(file)
    )
    file.write_text(Snapshot().to_json())
    assert "HCCL_OP_EXPANSION_MODE" not in printed(capsys, "--profile", "infer", "--from", str(file))


def test_the_language(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "请填写" in printed(capsys, "--lang", "zh")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert "请填写" in printed(capsys)
    assert "请填写" not in printed(capsys, "--lang", "en")
