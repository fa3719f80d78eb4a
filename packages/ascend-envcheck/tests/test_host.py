"""The machine around the interpreter: what the probe sees of a made-up one, and what the rules say of facts.

The thresholds that are tested are those of the rules' titles and of the documents that they name.
"""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Mapping

import pytest
from fake_machine import TABLE

from ascend_envcheck import Finding, Severity, Snapshot, check
from ascend_envcheck.probes import host as probe
from ascend_envcheck.probes.place import Place
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.rules import host, resources
from ascend_envcheck.snapshot import CommandFacts, DiskFacts, Distribution, HostFacts, ImportFacts, PythonFacts

GIB = 1024**3
RULES = (*host.RULES, *resources.RULES)
TABLE_FACTS = {"npu-smi info": CommandFacts("ok", output=TABLE)}
FAIL, WARN, INFO, SKIP = Severity.FAIL, Severity.WARN, Severity.INFO, Severity.SKIP


def with_npu(facts: HostFacts, count: int = 1, **more: object) -> Snapshot:
    devices = {f"/dev/davinci{number}": "rw" for number in range(count)}
    made = replace(Snapshot(), host=replace(facts, live=True), devices=devices, commands=TABLE_FACTS)
    return replace(made, **more)  # type: ignore[arg-type]


def findings(rule: str, snapshot: Snapshot) -> tuple[Finding, ...]:
    return check(snapshot, only=[rule], rules=RULES).findings


def only(rule: str, snapshot: Snapshot) -> Finding:
    (finding,) = findings(rule, snapshot)
    return finding


# --- the probe


def place(root: Path, environ: Mapping[str, str] = {}, *, live: bool = True) -> Place:
    return Place(Tree(str(root)), environ, [], live=live, command_seconds=5, import_seconds=5)


def seen(root: Path, files: Mapping[str, str], environ: Mapping[str, str] = {}, *, live: bool = True) -> HostFacts:
    for path, text in files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    facts = probe.look(place(root, environ, live=live))["host"]
    assert isinstance(facts, HostFacts)
    return facts


def test_a_copy_of_files_tells_of_its_files_and_of_nothing_else(tmp_path: Path) -> None:
    facts = seen(
        tmp_path,
        {
            "/etc/os-release": 'NAME="openEuler"\nPRETTY_NAME="openEuler 22.03 (LTS-SP4)"\n',
            "/proc/meminfo": "MemTotal: 1 kB\n",
        },
        live=False,
    )
    assert facts == HostFacts(os_name="openEuler 22.03 (LTS-SP4)")


def test_a_running_machine(tmp_path: Path) -> None:
    facts = seen(
        tmp_path,
        {
            "/proc/meminfo": "MemTotal:    1056 kB\nMemAvailable:    900 kB\nHugePages_Free:   5\nKernelStack: 3 kB\n",
            "/sys/fs/cgroup/memory.max": "524288\n",
            "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "/proc/sys/net/ipv4/ip_local_reserved_ports": "60000-60031\n",
            "/sys/class/net/eth0/operstate": "up\n",
            "/sys/class/net/ib0/operstate": "down\n",
        },
        {"HOME": "/"},
    )
    assert facts.live
    assert facts.memory == {"MemTotal": 1056, "MemAvailable": 900, "HugePages_Free": 5, "CgroupLimit": 512}
    assert (facts.huge_pages, facts.governor, facts.reserved_ports) == ("madvise", "powersave", "60000-60031")
    assert facts.interfaces == {"eth0": "up", "ib0": "down"}
    assert set(facts.limits) == {"nofile", "memlock", "nproc", "core"}
    assert facts.kernel
    assert facts.cpus
    assert facts.root is not None
    assert facts.disks["home"].total > 0
    assert "shm" not in facts.disks, "there is no /dev/shm beneath this root"


def test_a_system_without_glibc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError(name)

    monkeypatch.setattr("os.confstr", unknown)
    assert seen(tmp_path, {}).libc == ""
    assert seen(tmp_path, {"/lib/ld-musl-aarch64.so.1": ""}).libc == "musl"


def test_a_folder_that_was_removed_under_our_feet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Path:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "cwd", gone)
    facts = seen(tmp_path, {}, {"HOME": "/"})
    assert "home" in facts.disks
    assert "cwd" not in facts.disks


def test_only_listening_sockets_count(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    rows = "   0: 00000000:EA60 00000000:0000 0A 0\n   1: 0100007F:EA61 0100007F:0016 01 0\n   2: junk\n"
    rows6 = "   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 0\n"
    assert seen(tmp_path, {"/proc/net/tcp": head + rows, "/proc/net/tcp6": head + rows6}).listening == (8080, 60000)


def test_this_machine_knows_its_own_sockets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        facts = probe.look(place(Path("/")))["host"]
        assert server.getsockname()[1] in facts.listening


@pytest.mark.parametrize(
    ("files", "environ", "kind"),
    [
        ({}, {}, ""),
        ({"/.dockerenv": ""}, {}, "docker"),
        ({"/run/.containerenv": ""}, {}, "podman"),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ({"/proc/1/cgroup": "12:cpu:/kubepods/burstable/pod1\n"}, {}, "kubernetes"),
        ({"/proc/1/cgroup": "0::/init.scope\n"}, {}, ""),
        ({}, {"container": "lxc"}, "lxc"),
    ],
)
def test_containers(tmp_path: Path, files: dict[str, str], environ: dict[str, str], kind: str) -> None:
    assert seen(tmp_path, files, environ).container == kind


def test_a_disk_that_never_answers_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(path: object) -> None:
        released.wait(30)
        raise OSError

    monkeypatch.setattr("os.statvfs", hang)
    monkeypatch.setattr(probe, "DISK_SECONDS", 0.05)
    facts = seen(tmp_path, {}, {"HOME": "/"})
    released.set()
    assert facts.disks["home"] == DiskFacts()


def test_of_the_clock_only_the_clock_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "usr/bin/chronyc"
    script.parent.mkdir(parents=True)
    script.write_text(
        "#!/bin/sh\ncat <<END\nReference ID    : CB00710F (ntp.example.org)\nStratum         : 3\n"
        "System time     : 0.000012 seconds slow of NTP time\nLeap status     : Normal\nEND\n"
    )
    script.chmod(0o755)
    answer = probe.look(place(tmp_path))["commands"]["chronyc tracking"]
    assert answer.output == "System time     : 0.000012 seconds slow of NTP time\nLeap status     : Normal"


# --- the rules


LAPTOP = replace(
    Snapshot(),
    python=PythonFacts(version="3.11.0", machine="x86_64"),
    host=HostFacts(
        live=True,
        os_name="Ubuntu 22.04.4 LTS",
        libc="glibc 2.35",
        kernel="4.15.0",
        governor="powersave",
        memory={"MemAvailable": 4 * 1024**2},
        huge_pages="madvise",
        limits={"nofile": 1024, "memlock": 65536, "nproc": 1000, "core": 0},
        disks={"home": DiskFacts(100 * GIB, 20 * GIB, 1000), "shm": DiskFacts(GIB // 16, GIB // 16)},
        listening=(60000,),
    ),
)


def test_a_laptop_hears_of_nothing_that_only_an_npu_needs() -> None:
    for finding in check(LAPTOP, rules=RULES).findings:
        assert finding.severity in (INFO, SKIP), finding


def test_the_same_machine_with_an_npu_hears_of_all_of_it() -> None:
    machine = replace(LAPTOP, devices={"/dev/davinci0": "rw"}, commands=TABLE_FACTS)
    bad = {
        finding.id: finding.severity
        for finding in check(machine, rules=RULES).findings
        if finding.severity in (FAIL, WARN)
    }
    assert bad == {
        "HOST-SHM": FAIL,
        "HOST-KERNEL": WARN,
        "HOST-MEM": WARN,
        "HOST-DISK": WARN,
        "HOST-ULIMIT": WARN,
        "HOST-PORTS": WARN,
    }


def test_nothing_is_known_of_an_empty_snapshot() -> None:
    for finding in check(Snapshot(), rules=RULES).findings:
        assert finding.severity is SKIP, finding


def test_of_a_copy_with_an_npu_all_is_skipped() -> None:
    copy = replace(Snapshot(), devices={"/dev/davinci0": "rw"}, commands=TABLE_FACTS)
    for finding in check(copy, rules=RULES).findings:
        assert finding.severity is SKIP, finding


def test_a_processor_without_wheels() -> None:
    machine = with_npu(HostFacts(), python=PythonFacts(machine="riscv64"))
    finding = only("HOST-ARCH", machine)
    assert (finding.severity, finding.blocks) == (FAIL, ("npu",))
    assert "riscv64" in finding.cause
    assert only("HOST-ARCH", replace(machine, python=PythonFacts(machine="aarch64"))).severity is INFO


@pytest.mark.parametrize(
    ("torch_npu", "machine", "libc", "severity"),
    [
        ("2.7.1", "x86_64", "glibc 2.27", FAIL),
        ("2.7.1", "x86_64", "glibc 2.28", INFO),
        ("2.6.0", "x86_64", "glibc 2.17", INFO),  # the wheels of 2.6 are manylinux2014 on x86-64 only
        ("2.6.0", "aarch64", "glibc 2.17", FAIL),
        ("2.5.1", "aarch64", "glibc 2.17", INFO),
        ("2.13.0", "aarch64", "glibc 2.31", INFO),
        ("2.13.0", "aarch64", "musl", FAIL),
        ("2.1.0", "aarch64", "glibc", SKIP),
        (None, "aarch64", "glibc 2.17", INFO),
    ],
)
def test_the_c_library(torch_npu: str | None, machine: str, libc: str, severity: Severity) -> None:
    facts = with_npu(HostFacts(libc=libc), python=PythonFacts(machine=machine))
    if torch_npu:
        facts = replace(facts, distributions={"torch_npu": Distribution(torch_npu)})
    assert only("HOST-GLIBC", facts).severity is severity


def test_a_torch_npu_that_imports_proves_the_c_library() -> None:
    facts = with_npu(HostFacts(libc="glibc 2.17"), python=PythonFacts(machine="aarch64"))
    facts = replace(facts, distributions={"torch_npu": Distribution("2.7.1")}, imports=ImportFacts(torch_npu="ok"))
    assert only("HOST-GLIBC", facts).severity is INFO


@pytest.mark.parametrize(
    ("kernel", "severity"),
    [
        ("4.19.90-2107.6.0.0192.8.oe1.aarch64", WARN),
        ("5.4.0", WARN),
        ("5.10.0-136.12.0.86.aarch64", INFO),
        ("6.6", INFO),
        ("?", SKIP),
    ],
)
def test_the_kernel(kernel: str, severity: Severity) -> None:
    assert only("HOST-KERNEL", with_npu(HostFacts(kernel=kernel))).severity is severity


def test_memory_counts_cards_not_chips_and_minds_the_container() -> None:
    a3 = (Path(__file__).parent / "data/npu_smi/a3.txt").read_text()
    plenty = HostFacts(memory={"MemAvailable": 64 * 1024**2})
    machine = with_npu(plenty, 2, commands={"npu-smi info": CommandFacts("ok", output=a3)})
    assert only("HOST-MEM", machine).severity is INFO, "two dies are one card"
    assert only("HOST-MEM", with_npu(plenty, 2, commands={})).severity is WARN
    limited = HostFacts(memory={"MemAvailable": 64 * 1024**2, "CgroupLimit": 8 * 1024**2})
    assert "8 GiB" in only("HOST-MEM", with_npu(limited)).cause
    assert [
        verdict for verdict in check(machine, profile="infer", rules=RULES).findings if verdict.id == "HOST-MEM"
    ] == []


def test_a_full_disk_stops_every_machine() -> None:
    no_inode = replace(LAPTOP, host=replace(LAPTOP.host, disks={"home": DiskFacts(100 * GIB, 90 * GIB, 0)}))
    finding = only("HOST-DISK", no_inode)
    assert (finding.severity, finding.blocks) == (FAIL, ("cpu", "cuda", "npu"))
    assert "inode" in finding.cause


@pytest.mark.parametrize(
    ("total", "free", "severity"),
    [(1000, 200, INFO), (1000, 60, WARN), (100, 49, WARN), (10_000, 900, INFO), (100, 0, FAIL)],
)
def test_room_on_a_disk(total: int, free: int, severity: Severity) -> None:
    """Less than 50 GiB, or less than a tenth unless 500 GiB are free."""
    disks = {"home": DiskFacts(total * GIB, free * GIB)}
    assert only("HOST-DISK", with_npu(HostFacts(disks=disks))).severity is severity


def test_folders_of_one_file_system_are_told_together() -> None:
    disk = DiskFacts(1000 * GIB, 600 * GIB, 5)
    cause = only("HOST-DISK", with_npu(HostFacts(disks={"home": disk, "cwd": disk}))).cause
    assert cause == "room: cwd/home has 600.0 GiB of 1000.0 free"


def test_a_disk_that_does_not_answer() -> None:
    finding = only("HOST-DISK", replace(Snapshot(), host=HostFacts(live=True, disks={"home": DiskFacts()})))
    assert finding.severity is WARN
    assert "home" in finding.cause


@pytest.mark.parametrize(("size", "severity"), [(GIB // 16, FAIL), (GIB, WARN), (8 * GIB, WARN), (16 * GIB, INFO)])
def test_shared_memory(size: int, severity: Severity) -> None:
    facts = HostFacts(disks={"shm": DiskFacts(size, size)})
    finding = only("HOST-SHM", with_npu(facts))
    assert finding.severity is severity
    assert finding.tasks == ("train",)
    assert finding.blocks == (("npu", "cuda") if severity is FAIL else ())
    on_cuda = replace(Snapshot(), host=replace(facts, live=True), imports=ImportFacts(device="cuda"))
    assert only("HOST-SHM", on_cuda).severity is severity


def test_each_low_limit_is_named_and_none_that_is_enough() -> None:
    low = HostFacts(limits={"nofile": 1024, "memlock": 65536, "nproc": -1, "core": -1})
    assert [finding.cause.split()[2] for finding in findings("HOST-ULIMIT", with_npu(low))] == ["nofile", "memlock"]
    enough = HostFacts(limits={"nofile": 65535, "memlock": -1, "nproc": 32768, "core": 0})
    finding = only("HOST-ULIMIT", with_npu(enough))
    assert finding.severity is INFO
    assert "core" in finding.cause
    traced = HostFacts(limits={"nofile": -1, "memlock": -1, "nproc": -1, "core": -1})
    assert "high enough" in only("HOST-ULIMIT", with_npu(traced)).cause


def test_hugepages_of_a_310p() -> None:
    text = (Path(__file__).parent / "data/npu_smi/310p3-hugepages.txt").read_text()
    facts = HostFacts(huge_pages="always", memory={"HugePages_Free": 0})
    answers = {"npu-smi info": CommandFacts("ok", output=text)}
    assert only("HOST-HUGE", with_npu(facts, commands=answers)).severity is WARN
    assert only("HOST-HUGE", with_npu(facts)).severity is INFO, "a 910B does not live in hugepages"
    assert "madvise" in only("HOST-HUGE", with_npu(HostFacts(huge_pages="madvise"))).cause


def test_the_governor() -> None:
    assert "powersave" in only("HOST-CPU", with_npu(HostFacts(governor="powersave"))).cause
    assert "full speed" in only("HOST-CPU", with_npu(HostFacts(governor="performance"))).cause
    assert only("HOST-CPU", with_npu(HostFacts())).severity is SKIP


@pytest.mark.parametrize(
    ("reserved", "listening", "variables", "count", "severity"),
    [
        ("60000-60031", (), {}, 8, INFO),
        ("1024,60000-60015,60016-60031", (22,), {}, 8, INFO),
        ("60000-60030", (), {}, 8, WARN),
        ("", (), {}, 8, WARN),
        ("60000-60031", (60031,), {}, 8, FAIL),
        ("60000-60031", (60031,), {}, 1, WARN),  # one NPU talks to nobody
        ("60000-60031", (60032,), {}, 8, INFO),
        ("60000-60031", (), {"HCCL_IF_BASE_PORT": "50000"}, 8, WARN),
        ("50000-50031", (60000,), {"HCCL_IF_BASE_PORT": "50000"}, 8, INFO),
        ("7000", (7000,), {"HCCL_HOST_SOCKET_PORT_RANGE": "7000"}, 8, FAIL),
        ("", (), {"HCCL_HOST_SOCKET_PORT_RANGE": "auto"}, 8, INFO),
    ],
)
def test_the_ports_of_hccl(
    reserved: str, listening: tuple[int, ...], variables: dict[str, str], count: int, severity: Severity
) -> None:
    facts = HostFacts(reserved_ports=reserved, listening=listening)
    finding = only("HOST-PORTS", with_npu(facts, count, variables=variables))
    assert finding.severity is severity
    assert finding.blocks == (("npu",) if severity is FAIL else ())


def test_ports_reserved_by_others_stay_reserved() -> None:
    finding = only("HOST-PORTS", with_npu(HostFacts(reserved_ports="8080")))
    assert finding.command.endswith("=8080,60000-60031")


@pytest.mark.parametrize(
    ("line", "output", "severity", "words"),
    [
        ("chronyc tracking", "System time     : 0.000012 seconds slow of NTP time", INFO, "1.2e-05 s off"),
        ("chronyc tracking", "System time     : 5.5 seconds fast of NTP time", INFO, "5.5 s off"),
        ("chronyc tracking", "System time     : 90.0 seconds fast of NTP time", WARN, "90 s off"),
        ("chronyc tracking", "System time     : 1.2.3 seconds fast of NTP time", SKIP, "neither"),
        ("timedatectl", "System clock synchronized: yes", INFO, "is synchronized"),
        ("timedatectl", "System clock synchronized: no", INFO, "not synchronized"),
        ("timedatectl", "NTP synchronized: no", INFO, "not synchronized"),
        ("timedatectl", "", SKIP, "neither chronyc nor timedatectl"),
    ],
)
def test_the_clock(line: str, output: str, severity: Severity, words: str) -> None:
    finding = only(
        "HOST-CLOCK", with_npu(HostFacts(), commands={**TABLE_FACTS, line: CommandFacts("ok", output=output)})
    )
    assert finding.severity is severity
    assert words in finding.cause


def test_hccl_waits_as_long_as_it_is_told_to() -> None:
    answers = {**TABLE_FACTS, "chronyc tracking": CommandFacts("ok", output="System time : 90.0 seconds slow of NTP")}
    patient = with_npu(HostFacts(), commands=answers, variables={"HCCL_CONNECT_TIMEOUT": "600"})
    assert only("HOST-CLOCK", patient).severity is INFO


def test_the_container() -> None:
    assert "kubernetes" in only("HOST-CONTAINER", replace(Snapshot(), host=HostFacts(container="kubernetes"))).cause
    assert only("HOST-CONTAINER", replace(Snapshot(), host=HostFacts(live=True))).severity is INFO


def test_a_command_holds_no_other_command() -> None:
    """A snapshot may come from anybody, and its commands are copied into a shell."""
    finding = only("HOST-PORTS", with_npu(HostFacts(reserved_ports="1; reboot")))
    assert "'1; reboot,60000-60031'" in finding.command
