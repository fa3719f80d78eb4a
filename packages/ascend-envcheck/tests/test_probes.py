"""Probes look at what is broken, hung, endless or secret, and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import TORCH_ON_CPU, TORCH_WITH_NPU, FakeMachine, healthy

from ascend_envcheck import Snapshot, check, collect, probes
from ascend_envcheck.probes import PROBES, python
from ascend_envcheck.probes.command import last_line, run
from ascend_envcheck.probes.place import Facts, Place
from ascend_envcheck.probes.redact import redact, users
from ascend_envcheck.probes.tree import MAX_BYTES, Tree
from ascend_envcheck.snapshot import CommandFacts

ENV = {"PATH": "/usr/bin:/bin"}


def test_an_empty_machine(machine: FakeMachine) -> None:
    snapshot = machine.snapshot()
    assert not any((snapshot.distributions, snapshot.files, snapshot.devices, snapshot.paths))
    assert snapshot.imports.torch == snapshot.command("npu-smi info").outcome == "missing"
    assert snapshot.python.version == ".".join(map(str, sys.version_info[:3]))


def test_what_is_waited_for_is_told_and_the_import_can_be_left_out(tmp_path: Path) -> None:
    steps: list[str] = []
    snapshot = collect(root=str(tmp_path), environ={}, search_path=[], import_torch=False, progress=steps.append)
    assert snapshot.imports.torch == "not-run"
    assert {name for step in steps for name in step.split(", ")} <= {*PROBES}
    assert not snapshot.probes


def test_a_probe_that_fails_or_hangs_is_a_fact_and_loses_nothing_else(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead network disk holds a probe in the kernel; nobody can end it."""
    healthy(machine)

    def fail(place: Place) -> Facts:
        raise ZeroDivisionError("a defect")

    gate = threading.Event()

    def hang(place: Place) -> Facts:
        gate.wait(1000)
        return {}

    monkeypatch.setattr(probes, "PROBES", {**PROBES, "bad": fail, "hung": hang})
    monkeypatch.setattr(probes, "_PATIENCE", 0.0)
    snapshot = machine.snapshot(command_seconds=1)
    gate.set()
    assert {name: (facts.outcome, facts.detail) for name, facts in snapshot.probes.items()} == {
        "bad": ("failed", "ZeroDivisionError('a defect')"),
        "hung": ("timeout", "it did not end; a network disk that does not answer?"),
    }
    assert snapshot.cann_homes
    found = [finding.cause for finding in check(snapshot, only=["PROBES"]).findings]
    assert ["bad" in cause or "hung" in cause for cause in found] == [True, True]


def test_run() -> None:
    assert run(["/bin/sh", "-c", "echo out; echo err >&2"], ENV, seconds=60) == ("ok", "", "out\n", "err\n")
    assert run(["/bin/sh", "-c", "exit 3"], ENV, seconds=60)[:2] == ("failed", "exit status 3")
    assert run(["/bin/sh", "-c", "kill -9 $$"], ENV, seconds=60)[:2] == ("crashed", "ended by SIGKILL")
    assert run(["/no/such/file"], ENV, seconds=60)[0] == "missing"
    assert run(["/"], ENV, seconds=60)[0] == "failed"
    assert run(["/bin/cat"], ENV, seconds=60)[0] == "ok"  # no input to wait for


def test_a_time_limit_ends_the_children_too(tmp_path: Path) -> None:
    """The shell's child holds the pipe and would keep it open; it is ended with the shell."""
    script = f"echo before; sleep 1000 & echo $! > {tmp_path}/pid; wait"
    outcome, detail, out, _ = run(["/bin/sh", "-c", script], ENV, seconds=2)
    assert (outcome, detail, out) == ("timeout", "no answer within 2 s", "before\n")
    child = int((tmp_path / "pid").read_text())
    assert _ends(child), "it would have slept for 1000 s"


def test_an_interrupt_ends_what_was_started(machine: FakeMachine, tmp_path: Path) -> None:
    """A child is a session of its own, which Ctrl-C does not reach: an import that hangs would stay for ever."""
    note = tmp_path / "pids"
    machine.torch("2.7.1", f"import os, time\nopen({str(note)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(1000)\n")

    def interrupt(step: str) -> None:
        for _ in range(600):
            if note.exists() and note.read_text().endswith(" "):
                raise KeyboardInterrupt
            time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        collect(root=str(machine.root), environ=machine.environ, search_path=[], progress=interrupt)
    for thread in threading.enumerate():  # of the probes, which would go on with what they have yet to ask
        if thread.name.startswith("probe "):
            thread.join(30)
    (started,) = note.read_text().split()
    assert _ends(int(started))
    assert machine.snapshot(import_seconds=0.1).imports.torch == "timeout", "another look may start processes again"


def test_nothing_waits_for_the_threads_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter joins threads that are no daemons, with all that waits in their queue, after Ctrl-C too."""
    daemons: list[bool] = []

    def answer(self: Place, *line: str) -> CommandFacts:
        daemons.append(threading.current_thread().daemon)
        return CommandFacts("ok", output=line[1])

    monkeypatch.setattr(Place, "run", answer)
    place = Place(Tree(), ENV, [], live=True, command_seconds=5, import_seconds=5)
    answers = place.run_all([("ask", str(number)) for number in range(40)])
    assert {line: facts.output for line, facts in answers.items()} == {f"ask {n}": str(n) for n in range(40)}
    assert daemons == [True] * 40
    assert place.run_all([]) == {}


def _ends(process: int) -> bool:
    """Whether a process that was killed is gone, or waits for its parent: a busy machine takes a moment for it."""
    state = Path(f"/proc/{process}/stat")
    for _ in range(600):
        try:
            if state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_a_process_that_can_not_be_ended_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hung driver leaves processes that no signal ends; the probe goes on."""
    left: list[subprocess.Popen[bytes]] = []

    def never(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        left.append(self)
        raise subprocess.TimeoutExpired("npu-smi", timeout or 0)

    def refuse(pid: int, number: int) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", never)
        patch.setattr(os, "killpg", refuse)
        assert run(["/bin/sleep", "1000"], ENV, seconds=1)[0] == "timeout"
    assert left[0].wait() == -signal.SIGKILL


def test_an_interruption_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(self: subprocess.Popen[bytes], **options: object) -> tuple[bytes, bytes]:
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(["/bin/sleep", "1000"], ENV, seconds=60)
    assert started[0].returncode == -signal.SIGKILL


def test_a_real_time_signal_has_no_name() -> None:
    number = signal.SIGRTMIN + 1
    assert run(["/bin/sh", "-c", f"kill -{number} $$"], ENV, seconds=60)[1] == f"ended by signal {number}"


def test_last_line() -> None:
    assert last_line("a\n b \n\n") == "b"
    assert last_line("\n") == ""
    assert len(last_line("x" * 10_000)) == 300


def test_torch_that_hangs(machine: FakeMachine) -> None:
    machine.torch("2.7.1", "import time; time.sleep(1000)")
    seen = machine.snapshot(import_seconds=1).imports
    assert (seen.torch, seen.torch_detail, seen.torch_alone) == ("timeout", "no answer within 1 s", "timeout")


def test_torch_npu_that_dies_leaves_what_torch_said(machine: FakeMachine) -> None:
    machine.torch("2.7.1", TORCH_ON_CPU)
    machine.torch_npu("2.7.1", "import os, signal; os.kill(os.getpid(), signal.SIGABRT)")
    seen = machine.snapshot().imports
    assert (seen.torch, seen.torch_version, seen.accelerator_api) == ("ok", "2.7.1", True)
    assert (seen.torch_npu, seen.torch_npu_detail) == ("crashed", "ended by SIGABRT")


def test_what_torch_prints_is_not_taken_for_facts(machine: FakeMachine) -> None:
    machine.torch("2.7.1", 'print(\'envcheck:{"torch": "missing"}\')\n' + TORCH_ON_CPU)
    machine.module("sitecustomize", "print('hello')")
    assert machine.snapshot().imports.torch == "ok"


def test_autoload_that_is_off_already_is_not_tried_again(machine: FakeMachine) -> None:
    machine.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    machine.torch("2.7.1", "raise ImportError('libtorch.so')")
    seen = machine.snapshot().imports
    assert (seen.torch, seen.torch_detail, seen.torch_alone) == ("failed", "ImportError: libtorch.so", "not-run")


def test_the_working_folder_is_not_searched(
    machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.torch("2.7.1", TORCH_ON_CPU)
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    assert machine.snapshot().imports.torch == "ok"


def test_torch_is_never_imported_here(machine: FakeMachine) -> None:
    machine.torch("2.7.1", TORCH_WITH_NPU)
    before = sys.modules.get("torch")
    assert machine.snapshot().imports.device == "npu"
    assert sys.modules.get("torch") is before


@pytest.mark.parametrize(
    "environ",
    [
        {"USER": "jdoe"},
        {"LOGNAME": "jdoe"},
        {"USER": "root", "HOME": "/root", "SUDO_USER": "jdoe"},
        {"HOME": "/home/jdoe"},  # of a service or a container, which often sets nothing else
    ],
)
def test_the_name_of_the_user_is_in_no_path(environ: dict[str, str], tmp_path: Path) -> None:
    environ = {**environ, "LD_LIBRARY_PATH": "/home/jdoe/lib:/data/jdoe/lib"}
    snapshot = collect(root=str(tmp_path), environ=environ, search_path=[], import_torch=False)
    seen = replace(snapshot, python=replace(snapshot.python, executable="/data/jdoe/venv/bin/python"))
    assert "jdoe" not in snapshot.to_json()
    assert "jdoe" not in redact(seen, home="", users=users(environ)).to_json()


def test_a_cann_in_the_folder_of_the_user_is_judged_all_the_same(machine: FakeMachine) -> None:
    """On a data disk, where the home folder is not: all that names the folder must go on to name one."""
    home = "/data/jdoe/Ascend/cann"
    machine.file(f"{home}/runtime/version.info", "version_dir=8.5.0\n")
    machine.file(f"{home}/set_env.sh")
    machine.source(home)
    machine.environ["USER"] = "jdoe"
    snapshot = machine.snapshot()
    assert "jdoe" not in snapshot.to_json()
    (finding,) = check(snapshot, only=["CANN-VER"]).findings
    assert "8.5.0" in finding.cause


def test_no_secret_leaves_the_machine(machine: FakeMachine) -> None:
    """Planted: a home, a user, addresses, a serial number, a token, a password in a URL."""
    planted = {
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "HCCL_IF_IP": "10.1.2.3",
        "HCCL_SOCKET_IFNAME": "eth0",
        "HF_ENDPOINT": "https://ada:tops3cret@mirror.example.org",
        "USER": "adalove",
        "GLOO_SOCKET_IFNAME": "enx9c69d1001123",
        "TOKENIZERS_PARALLELISM": "false",
    }
    machine.environ.update(planted)
    home = "/home/ada/Ascend/cann"
    machine.file(f"{home}/runtime/version.info", "version_dir=8.5.0\nInstallUser=/home/ada\npath=/home/adalbert\n")
    machine.file(f"{home}/set_env.sh")
    machine.source(home)
    machine.file("/etc/hccn.conf", "address_0=192.168.100.101\nnetmask_0=255.255.255.0\naddress_1=192.168.100.101\n")
    machine.torch("2.7.1", "raise ImportError('/home/ada/lib/libtorch.so: gone, asked 10.1.2.3 fe80::1:2:3:4')")
    machine.npu()
    machine.npu_smi(
        "echo 'Serial Number : 2102312NPV10J'; echo 'MAC 9c:69:d1:00:11:22'; echo '| 0 1 | 77 | adalove |'\n"
    )
    text = machine.snapshot().to_json()
    for secret in (
        "hunter2",
        "10.1.2.3",
        "192.168.100",
        "tops3cret",
        "2102312NPV10J",
        "9c:69:d1",
        "9c69d1",
        "fe80::1",
        "adalove",
    ):
        assert secret not in text, secret
    assert "/home/ada" not in text.replace("/home/adalbert", "")
    again = Snapshot.from_json(text)
    assert again.variables["TOKENIZERS_PARALLELISM"] == "false", "no token"
    assert again.variables["GLOO_SOCKET_IFNAME"].startswith("enxmac-")
    assert again.cann_homes == ("~/Ascend/cann",)
    assert "~/Ascend/cann/runtime/version.info" in again.files
    assert again.imports.torch_detail.startswith("ImportError: ~/lib")


def test_the_same_address_is_the_same_token_in_one_file_only(machine: FakeMachine) -> None:
    line = "echo 'a 10.1.2.3 b 10.1.2.3 c 10.1.2.4; Version: 7.1.0.5, netmask 255.255.0.0'"
    machine.npu_smi(line + "\n")
    outputs = [machine.snapshot().command("npu-smi info").output.split() for _ in range(2)]
    words = outputs[0]
    assert words[1] == words[3] != words[5].rstrip(";")
    assert words[1].startswith("ip4-")
    assert words[7:] == ["7.1.0.5,", "netmask", "255.255.0.0"]
    assert outputs[0] != outputs[1]


def test_a_home_of_root_hides_nothing(machine: FakeMachine) -> None:
    machine.environ["HOME"] = "/"
    healthy(machine)
    assert machine.snapshot().cann_homes == ("/usr/local/Ascend/ascend-toolkit/latest",)


def test_the_first_home_wins_and_each_counts_once(machine: FakeMachine) -> None:
    machine.new_cann("8.5.0")
    old = machine.old_cann("8.2.RC1")
    machine.environ["ASCEND_TOOLKIT_HOME"] = old + "/"
    machine.environ["ASCEND_HOME_PATH"] = "relative/path"
    assert machine.snapshot().cann_homes == (old, "/usr/local/Ascend/cann")


def test_the_driver_lies_where_its_installer_says(machine: FakeMachine) -> None:
    machine.file("/etc/ascend_install.info", "UserName=HwHiAiUser\nDriver_Install_Path_Param=/opt/Ascend\n")
    machine.file("/opt/Ascend/driver/version.info", "Version=25.0.rc1\n")
    assert machine.snapshot().files["/opt/Ascend/driver/version.info"] == "Version=25.0.rc1\n"


def test_nodes_are_written_down_with_access(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.npu()
    machine.file("/dev/davinci0_other")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("davinci0"))
    assert machine.snapshot().devices == {
        "/dev/davinci0": "denied",
        "/dev/davinci_manager": "rw",
        "/dev/devmm_svm": "rw",
        "/dev/hisi_hdc": "rw",
    }


def test_a_tree_of_odd_files(tmp_path: Path) -> None:
    tree = Tree(str(tmp_path))
    (tmp_path / "binary").write_bytes(b"version=\xff\x00" + b"x" * MAX_BYTES)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "out").symlink_to("/")
    os.mkfifo(tmp_path / "pipe")
    text = tree.text("/binary")
    assert text is not None
    assert text.startswith("version=\ufffd\x00x")
    assert len(text) == MAX_BYTES
    assert tree.text("/folder") is tree.text("/pipe") is tree.text("/loop") is tree.text("/none") is None
    assert tree.text("/nul\0byte") is tree.resolve("/nul\0byte") is tree.resolve("/loop") is tree.resolve("") is None
    assert tree.resolve("/folder") == "/folder"
    assert tree.resolve("/out") == "/"
    assert tree.names("/binary") == tree.names("/none") == ()


def test_an_unreadable_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("x")

    def refuse(*arguments: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "open", refuse)
    assert Tree(str(tmp_path)).text("/secret") is None


def test_distributions_half_removed(tmp_path: Path) -> None:
    (tmp_path / "torch-2.7.1.dist-info").mkdir()  # pip was stopped: no METADATA
    broken = tmp_path / "transformers-5.0.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Name: transformers\n")
    garbled = tmp_path / "torchvision-0.22.1.dist-info"
    garbled.mkdir()
    (garbled / "METADATA").write_bytes(b"Name: torchvision\nVersion: \xff\xfe\n")
    assert python.distributions([str(tmp_path)]) == {}


def test_only_requirements_on_torch_are_kept(machine: FakeMachine) -> None:
    machine.distribution(
        "torchvision", "0.22.1", "numpy", "torch (==2.7.1)", "torchaudio==2.7.1", "torch>=2 ; extra == 'x'"
    )
    found = python.distributions([str(machine.site)])["torchvision"]
    assert (found.version, found.requires) == ("0.22.1", ("torch (==2.7.1)", "torch>=2 ; extra == 'x'"))
