"""Machines whose CANN, NNAL or Python packages are wrong in one way each; all else is in order.

What is expected follows from the words, and is every FAIL and WARN there is.
"""

from __future__ import annotations

import shutil

from fake_machine import ASCEND, TORCH_2_5, TORCH_WITH_NPU, FakeMachine, healthy
from scenario import Scenario

OLD_TREE = f"{ASCEND}/ascend-toolkit/8.2.RC1"
KERNELS = "opp/built-in/op_impl/ai_core/tbe/kernel/config"


def cann_9(m: FakeMachine) -> None:
    """TorchNPU 26.0.0 was made for CANN 9.0.0."""
    m.npu(hdk="25.5.2")
    m.source(m.new_cann("9.0.0"))
    m.nnal()
    m.torch("2.7.1", TORCH_WITH_NPU)
    m.torch_npu("2.7.1.post4")
    m.packages()


def no_decorator(m: FakeMachine) -> None:
    healthy(m)
    m.without("decorator")


def no_requests(m: FakeMachine) -> None:
    """It is in the vendor's long list, not in the short one of what every start imports."""
    healthy(m)
    m.without("requests")


def no_kernels(m: FakeMachine) -> None:
    """The toolkit alone, without the package of operators."""
    healthy(m)
    shutil.rmtree(m.root / f"{OLD_TREE}/{KERNELS}".lstrip("/"))


def removed_operators(m: FakeMachine) -> None:
    healthy(m)
    m.environ["ASCEND_OPP_PATH"] = "/opt/removed/opp"


def other_operators(m: FakeMachine) -> None:
    """Operators of 9.1.0 are in no list of what mixes with the toolkit 9.0.0."""
    cann_9(m)
    m.file(f"{ASCEND}/cann-9.0.0/aarch64-linux/ascend_ops_install.info", "version=9.1.0\n")


def newer_operators(m: FakeMachine) -> None:
    """The release notes let the operators 9.0.1 run with the toolkit 9.0.0."""
    cann_9(m)
    m.file(f"{ASCEND}/cann-9.0.0/aarch64-linux/ascend_ops_install.info", "version=9.0.1\n")


def other_nnal(m: FakeMachine) -> None:
    healthy(m)
    m.file(f"{ASCEND}/nnal/atb/latest/version.info", "Ascend-cann-atb : 8.1.RC1\nVersion : 8.1.RC1.B150\n")


def own_nnal(m: FakeMachine) -> None:
    healthy(m)
    m.file(f"{ASCEND}/nnal/atb/latest/version.info", "Ascend-cann-atb : 8.2.RC1\nVersion : 8.2.RC1.B150\n")


def copied_library(m: FakeMachine) -> None:
    """Somebody copied libascendcl.so to a folder of his own, behind CANN's."""
    healthy(m)
    m.file("/opt/mine/libascendcl.so")
    m.environ["LD_LIBRARY_PATH"] += ":/opt/mine"


def both_sourced(m: FakeMachine) -> None:
    """8.5.0 was sourced in a shell that had sourced 8.2.RC1, for which torch_npu 2.6.0 was made."""
    healthy(m)
    m.source(m.new_cann("8.5.0"))


def python_path_lost(m: FakeMachine) -> None:
    healthy(m)
    m.environ["PYTHONPATH"] = str(m.site)


def half_upgraded(m: FakeMachine) -> None:
    """The toolkit's record says 8.3.RC1, the runtime beneath it is of 8.2.RC1."""
    healthy(m)
    m.file(
        f"{OLD_TREE}/aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\n"
    )


def transformer_engine(m: FakeMachine) -> None:
    """megatron-core imports it where it finds it; wan-infer does not know it."""
    healthy(m)
    m.distribution("transformer-engine", "2.1.0")


def flash_attn(m: FakeMachine) -> None:
    healthy(m)
    m.distribution("flash-attn", "2.7.4")


def cuda_only_on_a_laptop(m: FakeMachine) -> None:
    """Without an NPU there is nothing that it stands in the way of."""
    m.torch("2.13.0+cpu")
    m.packages()
    m.distribution("flash-attn", "2.7.4")


def end_of_life(m: FakeMachine) -> None:
    """torch 2.5.1 has no torch.accelerator, and its torch_npu is no longer maintained."""
    m.npu(hdk="25.0.rc1")
    m.source(m.old_cann("8.1.RC1"))
    m.nnal()
    m.torch("2.5.1", TORCH_2_5)
    m.torch_npu("2.5.1")
    m.packages()


def cann_7(m: FakeMachine) -> None:
    """The set of TorchNPU 5.0.0: CANN 7.0.0, torch 2.1.0, HDK 23.0; torch.accelerator came with torch 2.6."""
    m.npu(hdk="23.0.3")
    m.firmware("7.1.0.3.220", drivers="[23.0.0,23.0.0.],[23.0,23.0.]")
    m.source(m.old_cann("7.0.0"))
    m.nnal()
    m.torch("2.1.0", TORCH_2_5)
    m.torch_npu("2.1.0")
    m.packages()


def other_cxx_abi(m: FakeMachine) -> None:
    """Of one release, and yet torch_npu misses a symbol of torch."""
    healthy(m)
    m.module("torch_npu", "raise ImportError('torch_npu/_C.so: undefined symbol: _ZN3c1011SymNodeImpl')")


def other_torchaudio(m: FakeMachine) -> None:
    m.torch("2.13.0+cpu")
    m.packages()
    m.distribution("torchaudio", "2.6.0", "torch==2.6.0")


def stable_torchaudio(m: FakeMachine) -> None:
    """torchaudio 2.11 runs on every torch from 2.11 on."""
    m.torch("2.13.0+cpu")
    m.packages()
    m.distribution("torchaudio", "2.11.0")


def no_av(m: FakeMachine) -> None:
    """wan-infer writes its videos with PyAV; mm-finetune needs none."""
    m.torch("2.13.0+cpu")
    m.packages()
    m.without("av")


def bare_clone(m: FakeMachine) -> None:
    """A clone of MindSpeed-MM without the copy of Megatron 0.12.1, MindSpeed, decord, apex, ffmpeg."""
    healthy(m)
    (m.site / "mindspeed_mm").mkdir()


def whole_clone(m: FakeMachine) -> None:
    healthy(m)
    (m.site / "mindspeed_mm").mkdir()
    _megatron(m, 12)
    _mindspeed(m, "2.3.0_core_r0.12.1")
    for name in ("decord", "apex"):
        m.distribution(name, "0.6.0")
    m.file("/usr/bin/ffmpeg")


def mindspeed_of_another_megatron(m: FakeMachine) -> None:
    whole_clone(m)
    _megatron(m, 8)


def _megatron(m: FakeMachine, minor: int) -> None:
    """Megatron's core/package_info.py holds three numbers, a line each."""
    folder = m.site / "megatron" / "core"
    folder.mkdir(parents=True, exist_ok=True)
    patch = {12: 1, 8: 0}[minor]
    (folder / "package_info.py").write_text(f"MAJOR = 0\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ''\n")


def _mindspeed(m: FakeMachine, branch: str) -> None:
    for path, text in (("mindspeed/megatron_adaptor.py", ""), (".git/HEAD", f"ref: refs/heads/{branch}\n")):
        target = m.site / path
        target.parent.mkdir()
        target.write_text(text)


def mindie(m: FakeMachine) -> None:
    """The versions that MindIE-SD 3.0.0 pins, and wan-infer wants another transformers and av."""
    healthy(m)
    m.distribution("mindiesd", "3.0.0")
    m.without("transformers", "av")
    pins = {"diffusers": "0.29.0", "transformers": "4.44.2", "accelerate": "0.26.1", "av": "12.0.0"}
    for name, version in pins.items():
        m.distribution(name, version)


STACKS = [
    Scenario("CANN 7.0", cann_7, {"TORCH-EOL": "WARN", "TORCH-ACCEL": "FAIL"}, "no", "no", "2025-12-30"),
    Scenario("CANN 9.0", cann_9, {}, "yes", "yes"),
    Scenario("CANN's Python lacks decorator", no_decorator, {"CANN-DEPS": "FAIL"}, "yes", "no", "decorator"),
    Scenario("CANN's Python lacks requests", no_requests, {"CANN-DEPS": "WARN"}, "yes", "yes", "requests"),
    Scenario("no operators are installed", no_kernels, {"CANN-OPP": "FAIL"}, "yes", "no", "no compiled operators"),
    Scenario("ASCEND_OPP_PATH of a removed CANN", removed_operators, {"CANN-OPP": "FAIL"}, "yes", "no", "/opt/removed"),
    Scenario("operators of another version", other_operators, {"CANN-OPS-VER": "WARN"}, "yes", "yes", "9.1.0"),
    Scenario("operators that may differ", newer_operators, {}, "yes", "yes"),
    Scenario("NNAL of another version", other_nnal, {"NNAL-INSTALLED": "WARN"}, "yes", "yes", "8.1.RC1"),
    Scenario("NNAL of CANN's version", own_nnal, {}, "yes", "yes"),
    Scenario("a copy of a library of CANN", copied_library, {"CANN-DUP": "WARN"}, "yes", "yes", "/opt/mine"),
    Scenario(
        "two CANNs sourced in one shell",
        both_sourced,
        {"CANN-HOME": "WARN", "CANN-DUP": "WARN", "TORCH-CANN": "WARN", "ENV-LIBRARY-PATH": "WARN"},
        "yes",
        "yes",
        "libascendcl.so",
    ),
    Scenario("PYTHONPATH set again", python_path_lost, {"CANN-SOURCED": "WARN"}, "yes", "yes", "PYTHONPATH"),
    Scenario(
        "a half upgraded CANN", half_upgraded, {"CANN-VER": "WARN", "TORCH-CANN": "WARN"}, "yes", "yes", "8.3.RC1"
    ),
    Scenario(
        "transformer-engine beside an NPU",
        transformer_engine,
        {"NO-CUDA-ONLY": "FAIL"},
        "yes",
        "no",
        "transformer-engine",
        ("yes", "yes"),
    ),
    Scenario("flash-attn beside an NPU", flash_attn, {"NO-CUDA-ONLY": "WARN"}, "yes", "yes", "flash-attn"),
    Scenario("flash-attn on a laptop", cuda_only_on_a_laptop, {}, "yes", "no"),
    Scenario(
        "a torch_npu past its life", end_of_life, {"TORCH-EOL": "WARN", "TORCH-ACCEL": "FAIL"}, "no", "no", "2026-08-08"
    ),
    Scenario(
        "torch_npu of the other C++ ABI",
        other_cxx_abi,
        {"IMPORT-TORCH-NPU": "FAIL", "TORCH-ABI": "FAIL"},
        "yes",
        "no",
        "C++ ABI",
    ),
    Scenario("torchaudio of torch 2.6", other_torchaudio, {"TORCHVISION": "WARN"}, "yes", "no", "torchaudio 2.6.0"),
    Scenario("torchaudio that runs on later torches", stable_torchaudio, {}, "yes", "no"),
    Scenario("no PyAV", no_av, {"WAN-PACKAGES": "WARN"}, "yes", "no", "av is not installed", ("no", "no")),
    Scenario(
        "a bare clone of MindSpeed-MM",
        bare_clone,
        {"MM-MEGATRON": "WARN", "MM-MINDSPEED": "WARN", "MM-DEPS": "WARN"},
        "yes",
        "yes",
        "0.12.1",
    ),
    Scenario("a whole clone of MindSpeed-MM", whole_clone, {}, "yes", "yes"),
    Scenario(
        "MindSpeed for another Megatron",
        mindspeed_of_another_megatron,
        {"MM-MINDSPEED": "WARN"},
        "yes",
        "yes",
        "core 0.8.0",
    ),
    Scenario(
        "the pins of MindIE-SD against ours",
        mindie,
        {"MM-PACKAGES": "WARN", "WAN-PACKAGES": "WARN"},
        "no",
        "no",
        "4.44.2",
    ),
]
