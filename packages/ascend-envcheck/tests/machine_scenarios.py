"""Machines whose driver, firmware, NPUs, CANN or variables are wrong in one way each; all else is in order.

What is expected follows from the words of the vendor's documents, quoted where they decide.
"""

from __future__ import annotations

import json

from fake_machine import ASCEND, TABLE, FakeMachine, healthy
from scenario import Scenario

OLD_HOME = f"{ASCEND}/ascend-toolkit/latest"


def driver_too_old(m: FakeMachine) -> None:
    """CANN 8.2.RC1 is listed with HDK 25.2; 24.1.rc1 is older than all that are listed."""
    healthy(m)
    m.npu(hdk="24.1.rc1")


def driver_not_listed(m: FakeMachine) -> None:
    """HDK 25.5.0 is newer than what is listed with CANN 8.2.RC1: it may work, nobody vouches for it."""
    healthy(m)
    m.npu(hdk="25.5.0")


def firmware_outside(m: FakeMachine) -> None:
    healthy(m)
    m.driver("25.2.0", firmware="[7.0.0,7.5.99]")


def driver_outside(m: FakeMachine) -> None:
    healthy(m)
    m.firmware("7.7.0.1.231", drivers="[23.0.0,23.0.0.],[24.1,24.1.]")


def reboot_due(m: FakeMachine) -> None:
    """The driver in memory says 25.0.rc1, the one on disk 25.2.0."""
    healthy(m)
    m.npu(TABLE.replace("25.2.0", "25.0.rc1"))
    m.driver("25.2.0")


def half_installed(m: FakeMachine) -> None:
    healthy(m)
    m.file("/etc/ascend_install.info", f"Driver_Install_Path_Param={ASCEND}\nDriver_Install_Status=failed\n")


def container(m: FakeMachine) -> None:
    """The default mounts of ascend-docker-runtime: libraries of the driver and dcmi, but no version.info.

    It works; driver and firmware can't be judged from inside, and the vendor's own list of mounts is longer.
    """
    healthy(m)
    m.file("/usr/local/dcmi/libdcmi.so")
    m.file("/.dockerenv")
    for part in ("driver", "firmware"):
        (m.root / f"usr/local/Ascend/{part}/version.info").unlink()
    (m.root / "etc/ascend_install.info").unlink()


def alarm(m: FakeMachine) -> None:
    healthy(m)
    m.npu(TABLE.replace("| OK      ", "| Alarm   "))


def warning(m: FakeMachine) -> None:
    healthy(m)
    m.npu(TABLE.replace("| OK      ", "| Warning "))


def full_memory(m: FakeMachine) -> None:
    healthy(m)
    m.npu(TABLE.replace(" 3372 / 65536", "60000 / 65536"))


def wrong_kernels(m: FakeMachine) -> None:
    """A 910B2 needs kernels of ascend910b; the package for 310P was installed."""
    healthy(m)
    folder = m.root / f"{ASCEND}/ascend-toolkit/8.2.RC1/opp/built-in/op_impl/ai_core/tbe/kernel/config".lstrip("/")
    (folder / "ascend910b").rename(folder / "ascend310p")


def no_bfloat16(m: FakeMachine) -> None:
    """bfloat16 came with 910B."""
    healthy(m)
    m.npu(TABLE.replace("910B2", "310P3"))
    m.kernels(f"{ASCEND}/ascend-toolkit/8.2.RC1", "ascend310p")


def stub_libraries(m: FakeMachine) -> None:
    """set_env.sh puts devlib on the path when it does not see the driver: ACL error 100039 later."""
    healthy(m)
    m.file(f"{ASCEND}/ascend-toolkit/8.2.RC1/devlib/libascend_hal.so")
    m.environ["LD_LIBRARY_PATH"] = f"{OLD_HOME}/devlib:" + m.environ["LD_LIBRARY_PATH"]


def other_abi(m: FakeMachine) -> None:
    """NNAL's set_env.sh picks the ABI of the torch that it sees; the one in use is another."""
    healthy(m)
    code = (m.site / "torch.py").read_text() + "\nclass _C: _GLIBCXX_USE_CXX11_ABI = False\n"
    m.module("torch", code)


def community_triton(m: FakeMachine) -> None:
    """Up to 3.2.0 triton and triton-ascend are one package: the last one installed wins."""
    healthy(m)
    m.distribution("triton-ascend", "3.2.0")
    m.distribution("triton", "3.2.0")


def allocator(m: FakeMachine) -> None:
    """expandable_segments has to be off where max_split_size_mb is set."""
    healthy(m)
    m.environ["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:True,max_split_size_mb:64"


def queue_off(m: FakeMachine) -> None:
    """ASCEND_LAUNCH_BLOCKING turns the task queue off."""
    healthy(m)
    m.environ.update(ASCEND_LAUNCH_BLOCKING="1", TASK_QUEUE_ENABLE="2")


def visible_devices(m: FakeMachine) -> None:
    """Parsing stops at the first illegal character: the NPUs after it vanish silently."""
    healthy(m)
    m.environ["ASCEND_RT_VISIBLE_DEVICES"] = "0, 1"


def rank_table(m: FakeMachine) -> None:
    """Two NPUs with one rank_id."""
    healthy(m)
    devices = [{"device_id": str(at), "device_ip": f"192.168.100.{at + 1}", "rank_id": "0"} for at in range(2)]
    table = {
        "status": "completed",
        "version": "1.0",
        "server_count": "1",
        "server_list": [{"server_id": "node0", "device": devices}],
    }
    m.file("/job/ranks.json", json.dumps(table))
    m.environ["RANK_TABLE_FILE"] = "/job/ranks.json"


def pins(m: FakeMachine) -> None:
    """MindIE-SD 3.0.0 pins diffusers 0.29.0."""
    healthy(m)
    m.distribution("mindiesd", "3.0.0")
    m.distribution("diffusers", "0.33.0")


MACHINES = [
    Scenario("a driver older than CANN is listed with", driver_too_old, {"HDK-PAIR": "FAIL"}, "yes", "no", "24.1.rc1"),
    Scenario("a driver that is not listed", driver_not_listed, {"HDK-PAIR": "WARN"}, "yes", "yes", "25.5.0"),
    Scenario("firmware outside the driver's range", firmware_outside, {"FW-DRV-CROSS": "FAIL"}, "yes", "no", "7.7.0"),
    Scenario("a driver that the firmware refuses", driver_outside, {"FW-DRV-CROSS": "FAIL"}, "yes", "no", "25.2.0"),
    Scenario("a reboot is due", reboot_due, {"DRV-REBOOT": "FAIL"}, "yes", "no", "25.0.rc1"),
    Scenario("the driver is half installed", half_installed, {"DRV-INSTALL-STATE": "WARN"}, "yes", "yes", "failed"),
    Scenario("a container with the default mounts", container, {}, "yes", "yes"),
    Scenario("an NPU in alarm", alarm, {"NPU-HEALTH": "FAIL"}, "yes", "no", "Alarm"),
    Scenario("an NPU with a warning", warning, {"NPU-HEALTH": "WARN"}, "yes", "yes", "Warning"),
    Scenario("the memory of the NPU is in use", full_memory, {"NPU-HBM": "WARN"}, "yes", "yes", "60000"),
    Scenario("kernels of another SoC", wrong_kernels, {"CANN-OPP": "FAIL"}, "yes", "no", "ascend910b"),
    Scenario("an NPU without bfloat16", no_bfloat16, {"NPU-SOC": "FAIL"}, "yes", "no", "ascend310p"),
    Scenario("stub libraries before the driver", stub_libraries, {"CANN-STUB": "FAIL"}, "yes", "no", "devlib"),
    Scenario("NNAL of the other C++ ABI", other_abi, {"NNAL-ABI": "FAIL"}, "yes", "no", "cxx_abi"),
    Scenario("triton over triton-ascend", community_triton, {"TRITON-ASCEND": "FAIL"}, "yes", "no", "triton"),
    Scenario("allocator options that exclude each other", allocator, {"ENV-ALLOC": "FAIL"}, "yes", "no", "max_split"),
    Scenario("the task queue is off", queue_off, {"ENV-QUEUE": "WARN"}, "yes", "yes", "ASCEND_LAUNCH_BLOCKING"),
    Scenario("spaces among the devices", visible_devices, {"ENV-VISIBLE": "FAIL"}, "yes", "no", "VISIBLE_DEVICES"),
    Scenario("a rank twice in the rank table", rank_table, {"NET-RANKTABLE": "FAIL"}, "yes", "no", "rank_id"),
    Scenario("a diffusers that MindIE-SD does not pin", pins, {"PKG-PIN": "WARN"}, "yes", "yes", "0.29.0"),
]
