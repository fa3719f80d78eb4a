"""What single rules say of facts that no whole machine shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ascend_envcheck import Finding, Severity, Snapshot, UnknownRuleError, check
from ascend_envcheck.rules.rule import npu_count, source_command
from ascend_envcheck.snapshot import CommandFacts, Distribution, ImportFacts, PythonFacts

HOME = "/usr/local/Ascend/ascend-toolkit/latest"
NPU = {"/dev/davinci0": "rw", "/dev/davinci_manager": "rw"}


def only(rule: str, snapshot: Snapshot) -> Finding:
    (finding,) = check(snapshot, only=[rule]).findings
    return finding


def with_distributions(snapshot: Snapshot, **versions: str) -> Snapshot:
    return replace(snapshot, distributions={name: Distribution(version) for name, version in versions.items()})


@pytest.mark.parametrize(
    ("python", "torch_npu", "severity", "words"),
    [
        ("3.8.18", None, Severity.FAIL, "3.10 or newer"),
        ("3.9.0", "2.7.1", Severity.FAIL, "3.10 or newer"),
        ("3.10.0", None, Severity.INFO, "new enough"),
        ("3.11.2", "2.7.1", Severity.INFO, "fits torch_npu 2.7.1"),
        ("3.12.1", "2.6.0.post5", Severity.INFO, "fits"),  # undocumented, but PyPI has the wheel
        ("3.14.0", "2.7.1", Severity.WARN, "documented for 3.9-3.13"),
        ("3.14.0", "99.0", Severity.INFO, "new enough"),
        ("pypy", None, Severity.SKIP, "no Python version"),
    ],
)
def test_python(python: str, torch_npu: str | None, severity: Severity, words: str) -> None:
    snapshot = replace(Snapshot(), python=PythonFacts(version=python))
    if torch_npu:
        snapshot = with_distributions(snapshot, torch_npu=torch_npu)
    finding = only("PY-VER", snapshot)
    assert finding.severity is severity
    assert words in finding.cause


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


def test_a_container_without_version_files_has_the_name_of_the_folder() -> None:
    target = "/usr/local/Ascend/ascend-toolkit/8.2.RC1"
    assert "CANN 8.2.RC1" in only("CANN-HOME", replace(Snapshot(), cann_homes=(HOME,), paths={HOME: target})).cause


def test_no_version_at_all_is_said_and_leaves_the_verdict_open() -> None:
    finding = only("CANN-HOME", replace(Snapshot(), cann_homes=(HOME,), paths={HOME: HOME}))
    assert finding.severity is Severity.SKIP
    assert finding.doubts == ("npu",)


def test_denied_nodes() -> None:
    finding = only("DEV-NODES", replace(Snapshot(), devices={**NPU, "/dev/davinci0": "denied"}))
    assert finding.severity is Severity.FAIL
    assert "/dev/davinci0" in finding.cause
    assert "HwHiAiUser" in finding.command


def test_npu_smi_that_hangs_or_prints_nothing() -> None:
    hung = replace(Snapshot(), devices=NPU, npu_smi=CommandFacts("timeout", "no answer within 10 s"))
    assert "no answer within 10 s" in only("NPU-SMI", hung).cause
    blank = replace(Snapshot(), devices=NPU, npu_smi=CommandFacts("ok"))
    assert "no table" in only("NPU-SMI", blank).cause


def test_npus_are_counted_by_nodes_then_table_then_torch() -> None:
    seen = ImportFacts(device="npu", device_count=4)
    assert npu_count(replace(Snapshot(), imports=seen)) == 4
    assert npu_count(replace(Snapshot(), imports=seen, devices=NPU)) == 1
    assert npu_count(replace(Snapshot(), devices={"/dev/davinci_manager": "rw"})) == 0


def test_a_pre_release_is_said_to_be_one() -> None:
    finding = only("TORCH-NPU", with_distributions(Snapshot(), torch="2.13.0", torch_npu="2.13.0"))
    assert finding.severity is Severity.INFO
    assert "pre-release" in finding.cause


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"torch": "2.7.1"}, "torch_npu is not installed"),
        ({"torch_npu": "2.7.1"}, "torch is not installed"),
        ({"torch": "main", "torch_npu": "2.7.1"}, "no release to read"),
    ],
)
def test_a_pair_that_is_none_is_skipped(versions: dict[str, str], words: str) -> None:
    finding = only("TORCH-NPU", with_distributions(Snapshot(), **versions))
    assert finding.severity is Severity.SKIP
    assert words in finding.cause


def test_a_mismatch_unknown_to_the_tables_still_has_a_command() -> None:
    finding = only("TORCH-NPU", with_distributions(Snapshot(), torch="99.1.0", torch_npu="99.0.0"))
    assert finding.severity is Severity.FAIL
    assert finding.command
    assert finding.source


def test_the_pip_line_knows_the_cpu_wheels_of_x86() -> None:
    snapshot = with_distributions(Snapshot(), torch="2.6.0", torch_npu="2.7.1")
    x86 = replace(snapshot, python=PythonFacts(version="3.11.0", machine="x86_64"))
    arm = replace(snapshot, python=PythonFacts(version="3.11.0", machine="aarch64"))
    assert "torch==2.6.0+cpu" in only("TORCH-NPU", x86).command
    assert "download.pytorch.org/whl/cpu" in only("TORCH-NPU", x86).command
    assert "+cpu" not in only("TORCH-NPU", arm).command


def test_cann_that_no_source_names() -> None:
    snapshot = replace(Snapshot(), cann_homes=(HOME,), files={f"{HOME}/runtime/version.info": "version_dir=9.2.0"})
    finding = only("TORCH-CANN", with_distributions(snapshot, torch="2.14.0", torch_npu="2.14.0"))
    assert finding.severity is Severity.SKIP
    assert "no source says" in finding.cause


def test_cann_without_a_version_is_not_compared() -> None:
    snapshot = with_distributions(replace(Snapshot(), cann_homes=(HOME,), devices=NPU), torch_npu="2.7.1")
    finding = only("TORCH-CANN", snapshot)
    assert (finding.severity, finding.doubts) == (Severity.SKIP, ("npu",))


def test_torch_npu_that_breaks_on_a_machine_without_npu_is_no_fault() -> None:
    seen = ImportFacts(torch="ok", torch_npu="failed", torch_npu_detail="libhccl.so: cannot open shared object file")
    finding = only("IMPORT-TORCH-NPU", with_distributions(replace(Snapshot(), imports=seen), torch_npu="2.7.1"))
    assert finding.severity is Severity.SKIP
    assert "libhccl.so" in finding.cause


def test_torch_npu_behind_a_broken_torch_is_left_open() -> None:
    snapshot = with_distributions(replace(Snapshot(), imports=ImportFacts(torch="failed")), torch_npu="2.7.1")
    assert only("IMPORT-TORCH-NPU", snapshot).cause == "torch itself does not import"
    untried = with_distributions(Snapshot(), torch_npu="2.7.1")
    assert "not tried" in only("IMPORT-TORCH-NPU", untried).cause


def test_torchvision_that_nobody_knows() -> None:
    finding = only("TORCHVISION", with_distributions(Snapshot(), torch="99.0.0", torchvision="0.114.0"))
    assert finding.severity is Severity.SKIP
    pinned = {"torch": Distribution("99.0.0"), "torchvision": Distribution("0.1", ("torch==98.0.0",))}
    finding = only("TORCHVISION", replace(Snapshot(), distributions=pinned))
    assert finding.severity is Severity.FAIL
    assert finding.command == "pip uninstall -y torchvision"


def test_the_torchvision_of_the_cpu_index() -> None:
    snapshot = replace(Snapshot(), python=PythonFacts(machine="x86_64"))
    finding = only("TORCHVISION", with_distributions(snapshot, torch="2.9.0+cpu", torchvision="0.21.0"))
    assert finding.command.startswith("pip install --no-deps 'torchvision==0.24.*' --index-url")


def test_a_home_folder_stays_where_the_shell_expands_it() -> None:
    assert source_command("~/my Ascend/set_env.sh") == "source ~/'my Ascend/set_env.sh'"


def test_a_rule_left_out_leaves_its_verdicts_open() -> None:
    snapshot = replace(
        with_distributions(Snapshot(), torch="2.13.0"),
        python=PythonFacts(version="3.11.0"),
        imports=ImportFacts(torch="ok", accelerator_api=True),
    )
    cpu, npu = check(snapshot, skip=["MM-PACKAGES", "DEV-NODES"]).verdicts
    assert (cpu.answer, cpu.reason) == ("not known", "MM-PACKAGES was left out")
    assert npu.answer == "not known"
    assert "DEV-NODES was left out" in npu.reason


def test_a_typo_is_understood() -> None:
    with pytest.raises(UnknownRuleError, match=r"no rule 'TORCH-NPUS', did you mean TORCH-NPU\?.*list"):
        check(Snapshot(), only=["TORCH-NPUS"])
    with pytest.raises(UnknownRuleError, match=r"no rule '§'; `ascend-envcheck list`"):
        check(Snapshot(), skip=["§"])
    with pytest.raises(UnknownRuleError, match="leave no rule"):
        check(Snapshot(), only=["PY-VER"], skip=["PY-VER"])
