"""What the rules on Python, torch and torch_npu say of facts that no whole machine shows, and what their probes see."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import TORCH_ON_CPU, FakeMachine

from ascend_envcheck import Finding, Severity, Snapshot, check
from ascend_envcheck.messages import CHINESE, told
from ascend_envcheck.probes.smoke import smoke
from ascend_envcheck.snapshot import CommandFacts, Distribution, HostFacts, ImportFacts, PythonFacts

HOME = "/usr/local/Ascend/ascend-toolkit/latest"
NPU = {"/dev/davinci0": "rw", "/dev/davinci_manager": "rw"}
LIVE = HostFacts(live=True)


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
    ("executable", "on_path", "active", "severity"),
    [
        ("/venv/bin/python3.11", "/venv/bin/python3", "/venv", Severity.INFO),
        ("/opt/pipx/bin/python", "/conda/envs/npu/bin/python3", "/conda/envs/npu", Severity.WARN),
        ("/conda/envs/npu/bin/python", "/usr/bin/python3", "/conda/envs/npu", Severity.INFO),
        ("/venv/bin/python", "/usr/bin/python3", "", Severity.INFO),  # started by its path, nothing is active
        ("/venvs/a/bin/python", "/venvs/ab/bin/python3", "/venvs/ab", Severity.WARN),
    ],
)
def test_which_python_was_judged(executable: str, on_path: str, active: str, severity: Severity) -> None:
    python = PythonFacts(version="3.11.0", executable=executable, on_path=on_path)
    variables = {"CONDA_PREFIX": active} if active else {}
    snapshot = replace(Snapshot(), host=LIVE, python=python, variables=variables)
    assert only("PY-EXE", snapshot).severity is severity
    assert only("PY-EXE", replace(snapshot, host=HostFacts())).severity is Severity.SKIP


def test_contradictions_among_the_packages_that_matter() -> None:
    output = (
        "torch-npu 2.7.1 has requirement torch==2.7.1, but you have torch 2.6.0.\n"
        "jupyter 1.0 requires notebook, which is not installed.\n"
    )
    asked = {"python -m pip check": CommandFacts("failed", "exit status 1", output)}
    snapshot = with_distributions(replace(Snapshot(), host=LIVE, commands=asked), torch_npu="2.7.1")
    found = [finding for finding in check(snapshot, only=["PY-EXE"]).findings if finding.severity is Severity.WARN]
    assert ["torch==2.7.1" in finding.cause and "more" not in finding.cause for finding in found] == [True]
    assert only("PY-EXE", with_distributions(snapshot, numpy="1.26.4")).severity is Severity.INFO


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


def test_a_mismatch_reads_in_chinese_too() -> None:
    finding = only("TORCH-NPU", with_distributions(Snapshot(), torch="2.6.0", torch_npu="2.7.1"))
    chinese = told(finding.cause, CHINESE)
    assert "2.6.0" in chinese
    assert "2.7.1" in chinese
    assert "版本不同" in chinese


def test_the_pip_line_knows_the_cpu_wheels_of_x86() -> None:
    snapshot = with_distributions(Snapshot(), torch="2.6.0", torch_npu="2.7.1")
    x86 = replace(snapshot, python=PythonFacts(version="3.11.0", machine="x86_64"))
    arm = replace(snapshot, python=PythonFacts(version="3.11.0", machine="aarch64"))
    assert "torch==2.6.0+cpu" in only("TORCH-NPU", x86).command
    assert "download.pytorch.org/whl/cpu" in only("TORCH-NPU", x86).command
    assert "+cpu" not in only("TORCH-NPU", arm).command


def test_what_is_said_of_one_mismatch_leads_to_one_pair() -> None:
    """torch_npu for this torch and this CANN; another CANN as well would part the pair again."""
    files = {f"{HOME}/runtime/version.info": "version_dir=8.2.RC1"}
    snapshot = with_distributions(
        replace(Snapshot(), cann_homes=(HOME,), files=files), torch="2.6.0", torch_npu="2.7.1"
    )
    assert only("TORCH-CANN", snapshot).severity is Severity.WARN
    assert only("TORCH-CANN", snapshot).command == only("TORCH-NPU", snapshot).command


@pytest.mark.parametrize(
    ("torch", "torch_npu", "command"),
    [
        ("2.5.1+cpu", None, "pip install 'torch>=2.6' --index-url https://download.pytorch.org/whl/cpu"),
        ("2.5.1+cu121", None, "pip install 'torch>=2.6'"),  # PyPI's torch for x86-64 is one of CUDA
        ("2.5.1+cpu", "2.5.1", "ascend-envcheck matrix --solve   # torch and torch_npu are upgraded together"),
    ],
)
def test_an_old_torch_is_upgraded_without_loss(torch: str, torch_npu: str | None, command: str) -> None:
    """Neither CUDA is taken from it, nor its torch_npu left behind."""
    seen = ImportFacts(torch="ok", torch_version=torch, accelerator_api=False)
    snapshot = replace(Snapshot(), imports=seen, python=PythonFacts(machine="x86_64"))
    versions = {"torch": torch, **({"torch_npu": torch_npu} if torch_npu else {})}
    finding = only("TORCH-ACCEL", with_distributions(snapshot, **versions))
    assert (finding.severity, finding.command) == (Severity.FAIL, command)


def test_an_import_that_was_not_tried_is_said_once() -> None:
    report = check(Snapshot(), profile="train", only=["IMPORT-TORCH", "TORCH-ACCEL"])
    verdict = next(verdict for verdict in report.verdicts if verdict.device == "cpu")
    assert verdict.answer == "not known"
    assert sum("import" in reason for reason in verdict.reasons) == 1


@pytest.mark.parametrize(
    ("outcome", "detail"), [("failed", "ImportError: no"), ("timeout", "no answer within 9 s"), ("crashed", "")]
)
def test_a_failed_import_is_told_by_its_reason(outcome: str, detail: str) -> None:
    finding = only("IMPORT-TORCH", replace(Snapshot(), imports=ImportFacts(torch=outcome, torch_detail=detail)))
    assert finding.cause == f"`import torch` fails: {detail or outcome}"


def test_two_kinds_of_accelerator() -> None:
    seen = ImportFacts(torch="ok", device="cuda", device_count=1)
    snapshot = with_distributions(replace(Snapshot(), imports=seen, devices=NPU), torch="2.7.1", torch_npu="2.7.1")
    assert only("TORCH-NPU", snapshot).severity is Severity.WARN
    assert "CUDA" in only("TORCH-NPU", snapshot).cause


def test_cann_that_no_source_names() -> None:
    snapshot = replace(Snapshot(), cann_homes=(HOME,), files={f"{HOME}/runtime/version.info": "version_dir=9.2.0"})
    finding = only("TORCH-CANN", with_distributions(snapshot, torch="2.14.0", torch_npu="2.14.0"))
    assert finding.severity is Severity.SKIP
    assert "no source says" in finding.cause


def test_a_cann_of_the_future_is_unknown_and_no_fault() -> None:
    snapshot = replace(Snapshot(), cann_homes=(HOME,), files={f"{HOME}/runtime/version.info": "version_dir=12.0.0"})
    finding = only("TORCH-CANN", with_distributions(snapshot, torch="2.7.1", torch_npu="2.7.1.post8"))
    assert finding.severity is Severity.WARN
    assert "unknown to this tool" in finding.cause


def test_cann_without_a_version_is_not_compared() -> None:
    snapshot = with_distributions(replace(Snapshot(), cann_homes=(HOME,), devices=NPU), torch_npu="2.7.1")
    finding = only("TORCH-CANN", snapshot)
    assert (finding.severity, finding.doubts) == (Severity.SKIP, ("npu",))


UNDEFINED = ImportFacts(torch="ok", torch_npu="failed", torch_npu_detail="undefined symbol: _ZN3c10")


@pytest.mark.parametrize(
    ("torch", "seen", "severity"),
    [
        ("2.7.1", ImportFacts(torch="ok", torch_npu="ok", cxx11_abi=True), Severity.INFO),
        ("2.7.1", ImportFacts(torch="ok", torch_npu="ok", cxx11_abi=False), Severity.INFO),  # it works all the same
        ("2.7.1", ImportFacts(torch="ok", torch_npu="failed", cxx11_abi=False), Severity.WARN),
        ("2.7.1", UNDEFINED, Severity.FAIL),
        ("2.6.0", UNDEFINED, Severity.SKIP),  # TORCH-NPU speaks of it
        ("2.7.1", ImportFacts(), Severity.SKIP),
    ],
)
def test_the_cxx_abi_of_a_pair(torch: str, seen: ImportFacts, severity: Severity) -> None:
    snapshot = with_distributions(replace(Snapshot(), imports=seen), torch=torch, torch_npu="2.7.1.post2")
    assert only("TORCH-ABI", snapshot).severity is severity


@pytest.mark.parametrize(
    ("torch_npu", "severity", "words"),
    [
        ("2.5.1.post3", Severity.WARN, "2026-08-08"),
        ("2.6.0", Severity.INFO, "until 2027-01-25"),
        ("2.7.1", Severity.INFO, "is maintained"),
        ("99.0.0", Severity.SKIP, "no date"),
    ],
)
def test_the_end_of_a_torch_npu(torch_npu: str, severity: Severity, words: str) -> None:
    finding = only("TORCH-EOL", with_distributions(Snapshot(), torch_npu=torch_npu))
    assert finding.severity is severity
    assert words in finding.cause


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
    assert "another torch than 2.9.0+cpu, with which torchvision 0.24 goes" in finding.cause
    assert "torch 2.9.0+cpu 配套的是 torchvision 0.24" in told(finding.cause, CHINESE)


# docs.pytorch.org/audio, compatibility matrix
@pytest.mark.parametrize(
    ("torch", "torchaudio", "severity"),
    [
        ("2.6.0", "2.6.0", Severity.INFO),
        ("2.10.0", "2.9.1", Severity.WARN),
        ("2.12.0", "2.11.0", Severity.INFO),
        ("2.10.0", "2.11.0", Severity.WARN),
    ],
)
def test_torchaudio(torch: str, torchaudio: str, severity: Severity) -> None:
    assert only("TORCHVISION", with_distributions(Snapshot(), torch=torch, torchaudio=torchaudio)).severity is severity


@pytest.mark.parametrize(
    ("outcome", "severity", "words"),
    [
        (CommandFacts(), Severity.SKIP, "--smoke"),
        (CommandFacts("missing", "torch shows no accelerator"), Severity.SKIP, "no accelerator"),
        (CommandFacts("ok", "", "done: 2 x 2 matrix product\ndone: all-reduce over 8"), Severity.INFO, "all-reduce"),
        (CommandFacts("timeout", "no answer within 120 s", "done: 2 x 2 matrix product"), Severity.FAIL, "no answer"),
    ],
)
def test_the_outcome_of_a_computation(outcome: CommandFacts, severity: Severity, words: str) -> None:
    seen = ImportFacts(torch="ok", device="npu", device_count=8)
    finding = only("SMOKE", replace(Snapshot(), imports=seen, commands={"smoke": outcome}))
    assert finding.severity is severity
    assert words in finding.cause
    assert finding.blocks == (("npu",) if severity is Severity.FAIL else ())


def test_the_abi_of_torch_is_seen(machine: FakeMachine) -> None:
    machine.torch("2.7.1", TORCH_ON_CPU + "\nclass _C: _GLIBCXX_USE_CXX11_ABI = True\n")
    assert machine.snapshot().imports.cxx11_abi is True


def test_nothing_is_computed_unless_it_is_asked_for(machine: FakeMachine) -> None:
    machine.torch("2.7.1", TORCH_ON_CPU)
    assert "smoke" not in machine.snapshot().commands


TORCH_THAT_COMPUTES = """
float16 = "half"
class Tensor:
    def __init__(self, value): self.value = value
    def __matmul__(self, other): return Tensor([[{product}, 2.0], [2.0, 2.0]])
    def __getitem__(self, at): return self
    def cpu(self): return self
    def tolist(self): return self.value
    def item(self): return 108
def ones(*shape, device, dtype=None): return Tensor(None)
class nn:
    class functional:
        @staticmethod
        def conv3d(video, kernel, padding): return video
"""


@pytest.mark.parametrize(("product", "outcome"), [(2.0, "ok"), (3.0, "failed")])
def test_a_wrong_product_is_noticed(tmp_path: Path, product: float, outcome: str) -> None:
    (tmp_path / "torch.py").write_text(TORCH_THAT_COMPUTES.format(product=product))
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONOPTIMIZE": "1"}
    found = smoke(environ, "npu", 1, 60)
    assert found.outcome == outcome
    assert ("convolution" in found.output) == (outcome == "ok")
    assert outcome == "ok" or "2 x 2" in found.detail
