"""Two runs at once, runs that were killed at the end of their work, and what Ctrl-C says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mm_datafmt import ParseError, TargetError, conversion, convert
from mm_datafmt.cli import main
from mm_datafmt.locking import only_one
from mm_datafmt.outputs import Outputs

WriteFile = Callable[..., Path]

GOOD = {"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
HOLD = """
import sys, time
from pathlib import Path
from mm_datafmt.locking import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that writes out.json."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out.json"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_while_the_first_lives(
    tmp_path: Path, write_array: WriteFile, holder: subprocess.Popen[bytes]
) -> None:
    source, target = write_array([GOOD]), tmp_path / "out.json"
    for more in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(TargetError, match=r"another conversion is writing .*out\.json.*wait for it"):
            convert(source, target, **more)  # type: ignore[arg-type]
    assert convert(source, tmp_path / "other.json").written == 1
    holder.kill()
    holder.wait()
    assert convert(source, target, resume=True).written == 1
    assert not list(tmp_path.glob(".*"))


def test_one_process_is_not_let_in_twice(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    with only_one(target):
        with pytest.raises(TargetError), only_one(tmp_path / "." / "out.json"):
            pass
        with only_one(tmp_path / "other.json"):
            pass
    with only_one(target):
        pass
    assert not list(tmp_path.iterdir())


def kill_in(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, *, after: bool) -> None:
    """Let a call of ``owner.name`` be the last thing that happens; nobody tidies up."""
    original = getattr(owner, name)

    def last(*arguments: Any, **options: Any) -> None:
        if after:
            original(*arguments, **options)
        os._exit(9)

    monkeypatch.setattr(owner, name, last)


def killed(source: Path, target: Path, where: tuple[Any, str, bool], **options: Any) -> None:
    """Convert in a process that ends at a call."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch:
                kill_in(where[0], where[1], patch, after=where[2])
                convert(source, target, **options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(
    ("where", "there"),
    [
        ((Outputs, "appear", False), set()),
        ((Outputs, "appear", True), {"out.json", "out.val.json", "out.bad.jsonl"}),
        ((conversion, "write_data_json", True), {"out.json", "out.val.json", "out.bad.jsonl", "data.json"}),
    ],
)
def test_killed_at_the_end_of_its_work(
    where: tuple[Any, str, bool], there: set[str], tmp_path: Path, write_array: WriteFile
) -> None:
    source = write_array([{**GOOD, "id": n} for n in range(20)] + [5])
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    options: dict[str, Any] = {"on_bad": "skip", "val_ratio": 0.2, "dataset_dir": tmp_path}
    whole, target = tmp_path / "whole" / "out.json", tmp_path / "killed" / "out.json"
    convert(source, whole, data_json=whole.with_name("data.json"), **options)
    options["data_json"] = target.with_name("data.json")
    killed(source, target, where, **options)
    assert {path.name for path in target.parent.iterdir() if path.name[0] != "."} == there
    report = convert(source, target, resume=True, **options)
    assert (report.written, report.rejected) == (20, 1)
    for path in whole.parent.iterdir():
        found = target.with_name(path.name).read_bytes()
        assert found.replace(b"/killed/", b"/whole/") == path.read_bytes()
    assert {path.name for path in target.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}
    with pytest.raises(TargetError, match="exists already"):
        convert(source, target, resume=True, **options)


def test_what_appeared_meanwhile_is_not_replaced_by_a_resume(tmp_path: Path, write_array: WriteFile) -> None:
    source, target = write_array([GOOD]), tmp_path / "out.json"
    killed(source, target, (Outputs, "appear", False))
    target.write_text("mine")
    with pytest.raises(TargetError, match="exists already"):
        convert(source, target, resume=True)
    assert target.read_text() == "mine"
    target.unlink()
    assert convert(source, target, resume=True).written == 1


@pytest.mark.parametrize("text", ["[%s]", "[%s, 5]", "[%s", "[%s] 1", "[%s,]", "[]"])
def test_going_on_behind_the_last_record(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes behind it, and nothing is told a second time."""
    source = tmp_path / "s.json"
    source.write_text(text.replace("%s", ", ".join([json.dumps(GOOD)] * 3)))
    monkeypatch.setattr(conversion, "CHECKPOINT_SECONDS", 0)
    if text == "[]":
        with pytest.raises(ParseError):
            convert(source, tmp_path / "out.json", on_bad="skip", source_format="llava")
        return
    whole = convert(source, tmp_path / "whole.json", on_bad="skip")
    killed(source, tmp_path / "out.json", (conversion._Job, "_accept", False), on_bad="skip")
    assert convert(source, tmp_path / "out.json", on_bad="skip", resume=True) == whole
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, write_array: WriteFile) -> None:
    source, target = write_array([GOOD] * 3), tmp_path / "out.json"
    program = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mm_datafmt import conversion; conversion.CHECKPOINT_SECONDS = 0\n"
        "conversion._Job._accept = lambda self: time.sleep(60)\n"
        "from mm_datafmt.cli import main; sys.exit(main())"
    )
    arguments = ["convert", str(source), str(target), "--workers", "1"]
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / ".out.json.journal").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[1:] == ["interrupted; the same command with --resume goes on from there"]
    assert main([*arguments, "--resume"]) == 0
    assert len(json.loads(target.read_text())) == 3
