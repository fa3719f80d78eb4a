"""Whole machines, from files to findings.

Each scenario says in words what is wrong; what is expected follows from the words, and is every FAIL and WARN there is.
"""

from __future__ import annotations

import pytest
from fake_machine import TABLE, TORCH_2_5, TORCH_ON_CPU, TORCH_ON_CUDA, TORCH_WITH_NPU, FakeMachine, healthy
from machine_scenarios import MACHINES
from scenario import Scenario
from stack_scenarios import STACKS

from ascend_envcheck import Report, Severity


def cpu_only(m: FakeMachine) -> None:
    m.torch("2.13.0+cpu")
    m.packages()


def torch_alone(m: FakeMachine) -> None:
    m.torch("2.13.0+cpu")


def nothing(m: FakeMachine) -> None:
    assert not list(m.site.iterdir())


def new_layout(m: FakeMachine) -> None:
    m.npu(hdk="25.5.0")
    m.source(m.new_cann("8.5.0"))
    m.nnal()
    m.torch("2.7.1", TORCH_WITH_NPU)
    m.torch_npu("2.7.1.post2")
    m.packages()


def cross_series(m: FakeMachine) -> None:
    """TorchNPU 7.3 was made for CANN 8.5; the release notes let it run on 9.0 too."""
    m.npu(hdk="25.5.2")
    m.source(m.new_cann("9.0.0"))
    m.nnal()
    m.torch("2.7.1", TORCH_WITH_NPU)
    m.torch_npu("2.7.1.post2")
    m.packages()


def wrong_torch_npu(m: FakeMachine) -> None:
    """The trap of the walk-through: torch 2.6.0 beside the torch_npu of 2.7.1."""
    m.npu()
    m.source(m.old_cann("8.2.RC1"))
    m.nnal()
    m.torch("2.6.0", "raise ImportError('torch_npu/_C.so: undefined symbol: _ZN3c10')")
    m.torch_npu("2.7.1")
    m.packages()


def wrong_cann(m: FakeMachine) -> None:
    """torch_npu 2.6.0 is of TorchNPU 7.1.0, made for 8.2.RC1; older trains run on no other."""
    healthy(m)
    m.npu(hdk="25.5.0")
    m.environ.pop("LD_LIBRARY_PATH")
    m.source(m.new_cann("8.5.0"))
    m.environ["LD_LIBRARY_PATH"] += f":{m.environ['ATB_HOME_PATH']}/lib"
    (m.root / "usr/local/Ascend/ascend-toolkit/latest").unlink()


def two_canns(m: FakeMachine) -> None:
    healthy(m)
    m.new_cann("8.5.0")


def not_sourced(m: FakeMachine) -> None:
    healthy(m)
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        del m.environ[name]


def gone_home(m: FakeMachine) -> None:
    healthy(m)
    m.environ["ASCEND_HOME_PATH"] = "/opt/removed"


def library_path_lost(m: FakeMachine) -> None:
    healthy(m)
    m.environ["LD_LIBRARY_PATH"] = "/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_1/lib"


def no_cann(m: FakeMachine) -> None:
    m.npu()
    m.nnal()
    m.torch("2.6.0", TORCH_WITH_NPU)
    m.torch_npu("2.6.0", "raise ImportError('libascendcl.so: cannot open shared object file')")
    m.packages()


def nnal_missing(m: FakeMachine) -> None:
    m.npu()
    m.source(m.old_cann("8.2.RC1"))
    m.torch("2.6.0", TORCH_WITH_NPU)
    m.torch_npu("2.6.0", "raise ImportError('libatb.so: cannot open shared object file')")
    m.packages()


def nnal_unsourced_but_works(m: FakeMachine) -> None:
    m.npu()
    m.source(m.old_cann("8.2.RC1"))
    m.nnal(sourced=False)
    m.torch("2.6.0", TORCH_WITH_NPU)
    m.torch_npu("2.6.0")
    m.packages()


def torch_npu_missing(m: FakeMachine) -> None:
    m.without_site_packages()
    m.npu()
    m.source(m.old_cann("8.2.RC1"))
    m.nnal()
    m.torch("2.6.0")
    m.packages()


def torch_npu_newer_than_table(m: FakeMachine) -> None:
    m.npu(hdk="25.5.0")
    m.source(m.new_cann("8.5.0"))
    m.nnal()
    m.torch("2.99.0", TORCH_WITH_NPU)
    m.torch_npu("2.99.0")
    m.packages()


def torch_too_old(m: FakeMachine) -> None:
    m.torch("2.5.1", TORCH_2_5)
    m.packages()


def torch_dies(m: FakeMachine) -> None:
    m.torch("2.13.0", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    m.packages()


def autoload_breaks_torch(m: FakeMachine) -> None:
    code = (
        "import os\nif os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD') != '0':\n    raise RuntimeError('no backend')\n"
    )
    m.torch("2.7.1", code + TORCH_ON_CPU)
    m.torch_npu("2.7.1")
    m.packages()


def torchvision_of_another_torch(m: FakeMachine) -> None:
    cpu_only(m)
    m.distribution("torchvision", "0.21.0", "numpy", "torch (==2.6.0)")


def torchvision_without_pin(m: FakeMachine) -> None:
    m.torch("2.9.0")
    m.packages()
    m.distribution("torchvision", "0.21.0", "torch")


def torchvision_fits(m: FakeMachine) -> None:
    cpu_only(m)
    m.distribution("torchvision", "0.28.0", "torch==2.13.0")


def psutil_missing(m: FakeMachine) -> None:
    m.torch("2.13.0")
    m.packages()
    m.without("psutil")


def old_transformers(m: FakeMachine) -> None:
    """4.48 knows no Qwen2.5-VL; wan-infer asks for 5.0."""
    m.torch("2.13.0")
    m.packages()
    m.without("transformers")
    m.distribution("transformers", "4.48.3")


def container_without_devices(m: FakeMachine) -> None:
    healthy(m)
    for node in (m.root / "dev").iterdir():
        node.unlink()
    m.npu_smi("echo 'dcmi module initialize failed. ret is -8005'; exit 1\n")
    m.module("torch", f"__version__ = '2.6.0'\n{TORCH_ON_CPU}")


def driver_dead(m: FakeMachine) -> None:
    healthy(m)
    m.npu_smi("echo 'dcmi model initialized failed, because the device is used. ret is -8020'\necho bye\nexit 1\n")


def no_npu_smi(m: FakeMachine) -> None:
    healthy(m)
    (m.root / "usr/local/bin/npu-smi").unlink()


def managers_missing(m: FakeMachine) -> None:
    healthy(m)
    for name in ("davinci_manager", "devmm_svm", "hisi_hdc"):
        (m.root / "dev" / name).unlink()


def npu_not_shown(m: FakeMachine) -> None:
    """torch_npu imports, and the runtime then finds no device."""
    healthy(m)
    code = TORCH_WITH_NPU.replace("return True", "raise RuntimeError('ACL error 507008')")
    m.module("torch", f"__version__ = '2.6.0'\n{code}")


def cuda(m: FakeMachine) -> None:
    m.torch("2.13.0+cu130", TORCH_ON_CUDA)
    m.packages()


SCENARIOS = [
    Scenario("a laptop with all of it", cpu_only, {}, "yes", "no"),
    Scenario(
        "a plain CPU machine with torch",
        torch_alone,
        {"MM-PACKAGES": "WARN", "WAN-PACKAGES": "WARN"},
        "no",
        "no",
        "not installed",
    ),
    Scenario(
        "nothing",
        nothing,
        {"IMPORT-TORCH": "FAIL", "MM-PACKAGES": "WARN", "WAN-PACKAGES": "WARN"},
        "no",
        "no",
        "torch is not installed",
    ),
    Scenario("the walk-through's set", healthy, {}, "yes", "yes"),
    Scenario("CANN 8.5 layout", new_layout, {}, "yes", "yes"),
    Scenario("a pair that the vendor lets mix", cross_series, {}, "yes", "yes"),
    Scenario(
        "torch 2.6.0 with torch_npu 2.7.1",
        wrong_torch_npu,
        {"TORCH-NPU": "FAIL", "IMPORT-TORCH": "FAIL", "TORCH-CANN": "WARN"},
        "no",
        "no",
        "different releases",
    ),
    Scenario("torch_npu for another CANN", wrong_cann, {"TORCH-CANN": "WARN"}, "yes", "yes", "CANN 8.5.0"),
    Scenario("two CANN versions", two_canns, {"CANN-HOME": "WARN"}, "yes", "yes", "8.5.0"),
    Scenario("set_env.sh not sourced", not_sourced, {"CANN-SOURCED": "FAIL"}, "yes", "no", "not sourced"),
    Scenario("ASCEND_HOME_PATH of a removed CANN", gone_home, {"CANN-SOURCED": "FAIL"}, "yes", "no", "/opt/removed"),
    Scenario("LD_LIBRARY_PATH set again", library_path_lost, {"CANN-SOURCED": "FAIL"}, "yes", "no", "LD_LIBRARY_PATH"),
    Scenario(
        "an NPU, no CANN", no_cann, {"CANN-HOME": "FAIL", "IMPORT-TORCH-NPU": "FAIL"}, "yes", "no", "libascendcl.so"
    ),
    Scenario("NNAL missing", nnal_missing, {"NNAL-LIB": "FAIL", "IMPORT-TORCH-NPU": "FAIL"}, "yes", "no", "libatb.so"),
    Scenario("NNAL not sourced", nnal_unsourced_but_works, {"NNAL-LIB": "WARN"}, "yes", "yes", "not sourced"),
    Scenario("no torch_npu", torch_npu_missing, {"IMPORT-TORCH-NPU": "FAIL"}, "yes", "no", "is not installed"),
    Scenario(
        "newer than the tables",
        torch_npu_newer_than_table,
        {"TORCH-NPU": "WARN"},
        "yes",
        "not known",
        "may well be newer",
    ),
    Scenario("torch 2.5", torch_too_old, {"TORCH-ACCEL": "FAIL"}, "no", "no", "torch.accelerator"),
    Scenario("torch ends the process", torch_dies, {"IMPORT-TORCH": "FAIL"}, "no", "no", "SIGSEGV"),
    Scenario("torch_npu breaks torch", autoload_breaks_torch, {"IMPORT-TORCH": "FAIL"}, "no", "no", "no backend"),
    Scenario("torchvision of torch 2.6", torchvision_of_another_torch, {"TORCHVISION": "FAIL"}, "no", "no", "2.6.0"),
    Scenario("torchvision without a pin", torchvision_without_pin, {"TORCHVISION": "FAIL"}, "no", "no", "0.24"),
    Scenario("torchvision that fits", torchvision_fits, {}, "yes", "no"),
    Scenario(
        "megatron-core without psutil", psutil_missing, {"MM-PSUTIL": "FAIL"}, "no", "no", "psutil", ("yes", "no")
    ),
    Scenario(
        "transformers before Qwen2.5-VL",
        old_transformers,
        {"MM-PACKAGES": "WARN", "WAN-PACKAGES": "WARN"},
        "no",
        "no",
        "4.48.3",
    ),
    Scenario("a container without devices", container_without_devices, {"DEV-NODES": "WARN"}, "yes", "no", "container"),
    Scenario("the NPU is used elsewhere", driver_dead, {"NPU-SMI": "FAIL", "NPU-SHARE": "FAIL"}, "yes", "no", "-8020"),
    Scenario("npu-smi not mounted", no_npu_smi, {"NPU-SMI": "WARN"}, "yes", "yes", "npu-smi"),
    Scenario("manager nodes not mounted", managers_missing, {"DEV-NODES": "FAIL"}, "yes", "no", "davinci_manager"),
    Scenario("torch sees no NPU", npu_not_shown, {"TORCH-ACCEL": "FAIL"}, "yes", "no", "507008"),
    Scenario("a CUDA machine", cuda, {}, "yes", "no"),
    *MACHINES,
    *STACKS,
]


def faults(report: Report) -> dict[str, str]:
    return {f.id: f.severity.value for f in report.findings if f.severity in (Severity.FAIL, Severity.WARN)}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenario(machine: FakeMachine, scenario: Scenario) -> None:
    scenario.build(machine)
    report = machine.report()
    assert faults(report) == scenario.faults
    answers = {(verdict.task, verdict.device): verdict.answer for verdict in report.verdicts}
    train, infer = ((answers[task, "cpu"], answers[task, "npu"]) for task in ("train", "infer"))
    assert train == (scenario.cpu, scenario.npu)
    assert infer == (scenario.infer or train)
    assert report.exit_code() == int("FAIL" in scenario.faults.values())
    assert report.exit_code(strict=True) == int(bool(scenario.faults))
    assert all(finding.command.isprintable() for finding in report.findings), "a command is one line, to be copied"
    causes = [f.cause for f in report.findings if f.id in scenario.faults]
    assert not scenario.words or any(scenario.words in cause for cause in causes)
    for finding in report.findings:
        assert "\n" not in finding.cause
        assert finding.severity is not Severity.FAIL or (finding.command and finding.source)


def test_no_machine_is_told_twice() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)


def test_the_command_is_the_one_that_helps(machine: FakeMachine) -> None:
    wrong_torch_npu(machine)
    commands = {finding.id: finding.command for finding in machine.report().findings}
    # 2.6.0 is the build of the TorchNPU train 7.1.0, whose CANN is the installed 8.2.RC1.
    assert "torch==2.6.0" in commands["TORCH-NPU"]
    assert "torch_npu==2.6.0" in commands["TORCH-NPU"].split()


def test_the_set_env_that_exists_is_named(machine: FakeMachine) -> None:
    not_sourced(machine)
    commands = {finding.id: finding.command for finding in machine.report().findings}
    assert commands["CANN-SOURCED"] == "source /usr/local/Ascend/ascend-toolkit/set_env.sh"


def test_a_cuda_machine_gets_a_verdict_of_its_own(machine: FakeMachine) -> None:
    cuda(machine)
    assert [str(verdict) for verdict in machine.report().verdicts] == [
        "this machine can fine-tune Qwen2.5-VL on CPU: yes (tiny models)",
        "this machine can fine-tune Qwen2.5-VL on CUDA: yes",
        "this machine can fine-tune Qwen2.5-VL on NPU: no, because no NPU was found",
        "this machine can run Wan2.1 on CPU: yes (tiny models)",
        "this machine can run Wan2.1 on CUDA: yes",
        "this machine can run Wan2.1 on NPU: no, because no NPU was found",
    ]


def test_a_busy_or_ill_table_still_counts_the_npus(machine: FakeMachine) -> None:
    healthy(machine)
    machine.npu(TABLE.replace("| OK ", "| Alarm "))
    found = {finding.id: finding.cause for finding in machine.report().findings}
    assert found["DEV-NODES"] == "1 NPU (910B2)"
