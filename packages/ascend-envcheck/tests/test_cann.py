"""What the rules on CANN and NNAL say of facts that no whole machine shows, and what their probe sees."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import FakeMachine, healthy

from ascend_envcheck import Finding, Severity, Snapshot, check
from ascend_envcheck.messages import CHINESE, told
from ascend_envcheck.probes.cann import candidates, is_of_ascend, load
from ascend_envcheck.rules.rule import source_command
from ascend_envcheck.snapshot import CommandFacts, Distribution, ImportFacts

HOME = "/usr/local/Ascend/ascend-toolkit/latest"
NPU = {"/dev/davinci0": "rw", "/dev/davinci_manager": "rw"}
WITH_CANN = replace(
    Snapshot(),
    devices=NPU,
    cann_homes=(HOME,),
    paths={HOME: HOME, f"{HOME}/lib64": f"{HOME}/lib64"},
    variables={"ASCEND_HOME_PATH": HOME, "LD_LIBRARY_PATH": f"{HOME}/lib64"},
    files={f"{HOME}/runtime/version.info": "version_dir=8.2.RC1\n"},
)


def only(rule: str, snapshot: Snapshot) -> Finding:
    (finding,) = check(snapshot, only=[rule]).findings
    return finding


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.1.RC1\n", "8.1.RC1"),
        ("x86_64-linux/ascend_toolkit_install.info", "version=8.5.0\npath=/usr/local/Ascend/cann-8.5.0\n", "8.5.0"),
        ("share/info/runtime/version.info", "Version=8.5.0\nversion_dir=cann-8.5.0\n", "8.5.0"),
        ("runtime/version.info", "Version=8.2.0.0.201\nversion_dir=8.2.RC1\n", "8.2.RC1"),
        ("compiler/version.info", "version_dir=7.0.0\n", "7.0.0"),
        ("version.cfg", "# version: 1.0\nruntime_running_version=[7.5.0.1.129:8.0.RC3]\n", "8.0.RC3"),
    ],
)
def test_each_version_file(name: str, text: str, version: str) -> None:
    snapshot = replace(Snapshot(), cann_homes=(HOME,), paths={HOME: HOME}, files={f"{HOME}/{name}": text})
    assert only("CANN-HOME", snapshot).cause == f"CANN {version} at {HOME}"
    assert version in only("CANN-VER", snapshot).cause


def test_a_container_without_version_files_has_the_name_of_the_folder() -> None:
    target = "/usr/local/Ascend/ascend-toolkit/8.2.RC1"
    assert "CANN 8.2.RC1" in only("CANN-HOME", replace(Snapshot(), cann_homes=(HOME,), paths={HOME: target})).cause


def test_no_version_at_all_is_said_and_leaves_the_verdict_open() -> None:
    snapshot = replace(Snapshot(), cann_homes=(HOME,), paths={HOME: HOME})
    finding = only("CANN-HOME", snapshot)
    assert finding.severity is Severity.SKIP
    assert finding.doubts == ("npu",)
    assert only("CANN-VER", snapshot).severity is Severity.SKIP


def test_a_cann_newer_than_the_tables_is_unknown_and_no_fault() -> None:
    snapshot = replace(WITH_CANN, files={f"{HOME}/runtime/version.info": "version_dir=12.0.0\n"})
    finding = only("CANN-VER", snapshot)
    assert finding.severity is Severity.WARN
    assert "unknown to this tool" in finding.cause


def test_a_folder_of_links_is_the_home_all_the_same() -> None:
    """Some installers make `latest` a folder of links into the folder of the version."""
    real = f"{HOME.rpartition('/')[0]}/8.2.RC1/aarch64-linux/lib64"
    snapshot = replace(
        WITH_CANN,
        paths={HOME: HOME, f"{HOME}/lib64": real},
        variables={**WITH_CANN.variables, "PATH": f"{HOME}/bin", "PYTHONPATH": f"{HOME}/python/site-packages"},
    )
    assert only("CANN-SOURCED", snapshot).severity is Severity.INFO


def test_the_lost_paths_are_named_in_both_languages() -> None:
    finding = only("CANN-SOURCED", WITH_CANN)
    assert finding.severity is Severity.WARN
    for language in ("en", CHINESE):
        assert "PYTHONPATH" in told(finding.cause, language)
    assert told(finding.cause, CHINESE) != finding.cause


def test_libraries_that_do_not_load_are_a_fault_of_the_npu() -> None:
    missing = CommandFacts("failed", "libhccl.so: cannot open shared object file")
    loads = {"libascendcl.so": CommandFacts("ok"), "libhccl.so": missing, "libatb.so": missing}
    finding = only("CANN-LIBS", replace(WITH_CANN, loads=loads))
    assert (finding.severity, finding.blocks) == (Severity.FAIL, ("npu",))
    assert "libhccl.so (failed)" in finding.cause
    assert "libatb" not in finding.cause  # NNAL-LIB speaks of it


def test_libraries_are_not_judged_where_nothing_was_tried_or_sourced() -> None:
    assert only("CANN-LIBS", WITH_CANN).severity is Severity.SKIP
    unsourced = replace(WITH_CANN, variables={}, loads={"libhccl.so": CommandFacts("failed", "not found")})
    assert "CANN-SOURCED" in only("CANN-LIBS", unsourced).cause


@pytest.mark.parametrize(
    ("path", "severity"),
    [
        ("/usr/local/Ascend/driver/lib64/driver:{home}/lib64:{home}/devlib", Severity.INFO),
        ("{home}/devlib:/usr/local/Ascend/driver/lib64/driver", Severity.FAIL),
        ("{home}/lib64:{home}/devlib/", Severity.FAIL),
        ("{home}/runtime/lib64/stub:{home}/lib64", Severity.FAIL),
        ("{home}/lib64", Severity.INFO),
        ("", Severity.INFO),
    ],
)
def test_stubs_matter_before_the_driver_only(path: str, severity: Severity) -> None:
    snapshot = replace(WITH_CANN, variables={"LD_LIBRARY_PATH": path.format(home=HOME)})
    assert only("CANN-STUB", snapshot).severity is severity


def test_one_cann_may_list_its_library_twice() -> None:
    """lib64 and runtime/lib64 of one toolkit both hold libascendcl.so."""
    folders = (f"{HOME}/lib64", f"{HOME}/runtime/lib64")
    assert only("CANN-DUP", replace(WITH_CANN, libraries={"libascendcl.so": folders})).severity is Severity.INFO
    other = (*folders, "/usr/local/Ascend/cann-8.5.0/lib64")
    finding = only("CANN-DUP", replace(WITH_CANN, libraries={"libascendcl.so": other}))
    assert finding.severity is Severity.WARN
    assert "/usr/local/Ascend/cann-8.5.0/lib64" in finding.cause
    stub = (f"{HOME}/lib64", "/elsewhere/devlib")
    assert only("CANN-DUP", replace(WITH_CANN, libraries={"libascendcl.so": stub})).severity is Severity.INFO


@pytest.mark.parametrize(
    ("toolkit", "ops", "severity"),
    [
        ("8.5.0", "8.5.0", Severity.INFO),
        ("8.5.2", "9.0.1", Severity.INFO),  # release notes of 9.0.1
        ("9.0.1", "9.0.0", Severity.WARN),  # a newer toolkit than its operators is in no list
        ("9.0.0", "8.5.2", Severity.INFO),
        ("9.0.0", "77.0.0", Severity.WARN),
    ],
)
def test_operators_and_toolkit(toolkit: str, ops: str, severity: Severity) -> None:
    files = {
        f"{HOME}/aarch64-linux/ascend_toolkit_install.info": f"version={toolkit}\n",
        f"{HOME}/aarch64-linux/ascend_ops_install.info": f"package_name=Ascend-cann-910b-ops\nversion={ops}\n",
    }
    assert only("CANN-OPS-VER", replace(WITH_CANN, files=files)).severity is severity


@pytest.mark.parametrize(
    ("toolkit", "ops", "command"),
    [
        ("9.0.0", "77.0.0", "./Ascend-cann-910b-ops_9.0.0_*.run --install"),
        ("8.2.RC1", "77.0.0", "./Ascend-cann-kernels-910b_8.2.RC1_*.run --install"),  # called so before 8.5
    ],
)
def test_the_package_of_operators_is_named_for_the_npu_that_is_here(toolkit: str, ops: str, command: str) -> None:
    files = {
        f"{HOME}/aarch64-linux/ascend_toolkit_install.info": f"version={toolkit}\n",
        f"{HOME}/aarch64-linux/ascend_ops_install.info": f"version={ops}\n",
    }
    table = (Path(__file__).parent / "data" / "npu_smi" / "910b2.txt").read_text()
    listed = {"npu-smi info": CommandFacts("ok", output=table)}
    assert only("CANN-OPS-VER", replace(WITH_CANN, files=files, commands=listed)).command == command
    unknown = only("CANN-OPS-VER", replace(WITH_CANN, files=files, commands={}))
    assert unknown.command == command.replace("910b", "<soc>")


def test_the_old_layouts_kernels_tell_their_version() -> None:
    info = {f"{HOME}/opp_kernel/version.info": "Version=8.3.T5.0.B028\nversion_dir=8.3.RC1\n"}
    assert "8.3.RC1" in only("CANN-OPS-VER", replace(WITH_CANN, files={**WITH_CANN.files, **info})).cause
    running = {f"{HOME}/version.cfg": "opp_kernel_running_version=[8.2.0.0.201:8.2.RC1]\n"}
    assert only("CANN-OPS-VER", replace(WITH_CANN, files={**WITH_CANN.files, **running})).severity is Severity.INFO


@pytest.mark.parametrize(
    ("inner", "words"), [("V100R001C21SPC002B212", "list names"), ("V100R001C23", "does not name")]
)
def test_the_toolkits_list_of_drivers_is_a_note(inner: str, words: str) -> None:
    files = {
        f"{HOME}/aarch64-linux/ascend_toolkit_install.info": "compatible_version=[V100R001C19],[V100R001C21]\n",
        "/usr/local/Ascend/driver/version.info": f"Version=25.0.rc1\nInnerversion={inner}\n",
    }
    finding = only("CANN-DRVMATCH", replace(WITH_CANN, files=files))
    assert finding.severity is Severity.INFO
    assert words in finding.cause


def test_the_kernels_of_before_8_5_have_another_package() -> None:
    assert only("CANN-OPP", WITH_CANN).command.startswith("./Ascend-cann-kernels-")
    new = replace(WITH_CANN, files={f"{HOME}/share/info/runtime/version.info": "version_dir=cann-8.5.0\n"})
    assert "-ops_8.5.0" in only("CANN-OPP", new).command


@pytest.mark.parametrize(
    ("cann", "ascend", "community", "severity"),
    [
        ("8.5.0", "3.2.0", None, Severity.INFO),
        ("8.5.0", "3.2.0.dev20260322", None, Severity.INFO),
        ("9.0.0", "3.2.1", "3.5.0", Severity.INFO),  # it asks for that triton itself, and writes over it
        ("9.0.0", "3.2.1", "3.4.0", Severity.WARN),  # somebody installed it afterwards
        ("9.0.0", "3.2.0", None, Severity.WARN),
        ("9.1.0", "3.2.1", None, Severity.INFO),  # MindSpeed-MM
        ("9.1.0", "3.2.2", None, Severity.INFO),  # vllm-ascend
        ("8.1.RC1", "3.2.0", None, Severity.SKIP),
        ("8.5.0", "3.2.0", "3.2.0", Severity.FAIL),
    ],
)
def test_triton_ascend(cann: str, ascend: str, community: str | None, severity: Severity) -> None:
    found = {"triton-ascend": Distribution(ascend)}
    if community:
        found["triton"] = Distribution(community)
    files = {f"{HOME}/runtime/version.info": f"version_dir={cann}\n"}
    assert only("TRITON-ASCEND", replace(WITH_CANN, files=files, distributions=found)).severity is severity


@pytest.mark.parametrize(("nnal", "severity"), [("8.2.RC1.B150", Severity.INFO), ("8.2.RC2", Severity.WARN)])
def test_nnal_by_its_only_version_line(nnal: str, severity: Severity) -> None:
    home = "/usr/local/Ascend/nnal/atb"
    files = {**WITH_CANN.files, f"{home}/latest/version.info": f"Version : {nnal}\nPlatform : aarch64\n"}
    snapshot = replace(WITH_CANN, files=files, paths={**WITH_CANN.paths, home: home})
    assert only("NNAL-INSTALLED", snapshot).severity is severity


@pytest.mark.parametrize(
    ("folder", "abi", "severity"),
    [
        ("cxx_abi_1", True, Severity.INFO),
        ("cxx_abi_0", False, Severity.INFO),
        ("cxx_abi_1", False, Severity.FAIL),
        ("cxx_abi_0", True, Severity.FAIL),
        ("cxx_abi_1", None, Severity.SKIP),
        ("", True, Severity.SKIP),
    ],
)
def test_nnal_and_the_abi_of_torch(folder: str, abi: bool | None, severity: Severity) -> None:
    active = {"ATB_HOME_PATH": f"/usr/local/Ascend/nnal/atb/latest/atb/{folder}/"} if folder else {}
    finding = only("NNAL-ABI", replace(WITH_CANN, variables=active, imports=ImportFacts(torch="ok", cxx11_abi=abi)))
    assert finding.severity is severity
    assert severity is not Severity.FAIL or f"--cxx_abi={int(bool(abi))}" in finding.command


def test_an_nnal_that_does_not_load() -> None:
    broken = replace(
        WITH_CANN,
        libraries={"libatb.so": ("/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_0/lib",)},
        loads={"libatb.so": CommandFacts("failed", "undefined symbol: _ZN3Mki6LoggerE")},
    )
    assert only("NNAL-LIB", broken).severity is Severity.FAIL
    works = replace(broken, imports=ImportFacts(torch="ok", torch_npu="ok"))
    assert only("NNAL-LIB", works).severity is Severity.WARN


def test_a_home_folder_stays_where_the_shell_expands_it() -> None:
    assert source_command("~/my Ascend/set_env.sh") == "source ~/'my Ascend/set_env.sh'"


def test_the_loaders_path_tells_of_a_cann_that_no_variable_names() -> None:
    found = candidates({"HOME": "/home/ada"}, ["/opt/cann-9.0.0/lib64", "/opt/tk/aarch64-linux/devlib", "/opt/odd"])
    assert found[:2] == ["/opt/cann-9.0.0", "/opt/tk"]
    assert found[2:] == [
        "/usr/local/Ascend/cann",
        "/usr/local/Ascend/ascend-toolkit/latest",
        "/home/ada/Ascend/cann",
        "/home/ada/Ascend/ascend-toolkit/latest",
    ]


def test_of_path_only_the_vendors_folders_are_kept(machine: FakeMachine) -> None:
    healthy(machine)
    machine.environ["PATH"] += ":/home/ada/secret-project/bin"
    text = machine.snapshot().to_json()
    assert "secret-project" not in text
    assert is_of_ascend("/usr/local/Ascend/cann/bin")


def test_loading_tells_what_the_loader_says(tmp_path: Path) -> None:
    (tmp_path / "libascendcl.so").write_text("this is no library, and long enough to be read as one" * 40)
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    found = load(["libc.so.6", "libascendcl.so", "libhccl.so"], environ, 60)
    assert found["libc.so.6"].outcome == "ok"
    assert "invalid ELF header" in found["libascendcl.so"].detail
    assert "cannot open shared object file" in found["libhccl.so"].detail


def test_a_copy_of_files_is_not_loaded_from(machine: FakeMachine) -> None:
    healthy(machine)
    assert machine.snapshot().loads == {}


def test_a_version_from_a_snapshot_is_one_word_of_a_command() -> None:
    """A snapshot may come from anywhere, and its command is copied."""
    found = {"triton-ascend": Distribution("3.2.0; reboot"), "triton": Distribution("3.2.0")}
    command = only("TRITON-ASCEND", replace(WITH_CANN, distributions=found)).command
    assert shlex.split(command, comments=True)[-1] == "triton-ascend==3.2.0; reboot"
