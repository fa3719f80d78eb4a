"""A machine made of files: devices, npu-smi, CANN, NNAL, and a Python with fake torch modules.

The layouts follow the vendor's documents: CANN up to 8.3 in ``ascend-toolkit/<version>`` with ``latest`` beside it and
``runtime/version.info``; 8.5 and newer in ``cann-<version>`` with ``share/info/runtime/version.info``.
"""

from __future__ import annotations

from pathlib import Path

from ascend_envcheck import Report, Snapshot, check, collect

ASCEND = "/usr/local/Ascend"

HDK = "25.2.0"  # the driver that the vendor pairs with CANN 8.2.RC1
WAN_NEEDS = ("safetensors", "ftfy", "pillow", "av", "tqdm")
CANN_NEEDS = ("numpy", "decorator", "sympy", "cffi", "protobuf", "attrs", "pyyaml", "scipy", "requests", "absl-py")

TABLE = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B2               | OK            | 91.1        49                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3372 / 65536         |
+===========================+===============+====================================================+
"""

TORCH_WITH_NPU = """
class accelerator:
    @staticmethod
    def is_available(): return True
    @staticmethod
    def device_count(): return 1
    @staticmethod
    def current_accelerator():
        class device: type = "npu"
        return device
"""
TORCH_ON_CPU = TORCH_WITH_NPU.replace("return True", "return False")
TORCH_ON_CUDA = TORCH_WITH_NPU.replace('"npu"', '"cuda"')
TORCH_2_5 = ""  # without torch.accelerator


class FakeMachine:
    """Built step by step; `snapshot` runs the real probes on it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.site = folder / "root", folder / "site"
        self.root.mkdir()
        self.site.mkdir()
        self.environ = {"PATH": "/usr/bin:/bin", "HOME": "/home/ada", "PYTHONPATH": str(self.site)}

    def file(self, path: str, text: str = "") -> Path:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def link(self, path: str, target: str) -> None:
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)

    def npu(self, table: str = TABLE, *, hdk: str = HDK) -> None:
        """One NPU with its driver and firmware, all of which are in order."""
        self.driver(hdk)
        self.firmware("7.7.0.1.231")
        table = table.replace(HDK, hdk)
        for name in ("davinci0", "davinci_manager", "devmm_svm", "hisi_hdc"):
            self.file(f"/dev/{name}")
        self.npu_smi(f"cat <<'END'\n{table}END\n")

    def driver(self, version: str, *, firmware: str = "[7.0.0,8.9.9]") -> None:
        home = f"{ASCEND}/driver"
        self.file("/etc/ascend_install.info", f"Driver_Install_Path_Param={ASCEND}\nDriver_Install_Status=complete\n")
        self.file(
            f"{home}/version.info",
            f"Version={version}\nInnerversion=V100R001C23\ncompatible_version=[V100R001C19],[V100R001C20]\n"
            f"compatible_version_fw={firmware}\npackage_version={version}\n",
        )
        for folder in ("", "/common", "/driver"):
            self.file(f"{home}/lib64{folder}/libascend_{folder.strip('/') or 'top'}.so")
        self.file(f"{home}/lib64/driver/libascend_hal.so")

    def firmware(self, version: str, *, drivers: str = "[24.1,24.1.],[25.0,25.0.],[25.2,25.2.],[25.5,25.5.]") -> None:
        text = f"Version={version}\nfirmware_version={version}\ncompatible_version_drv={drivers}\n"
        self.file(f"{ASCEND}/firmware/version.info", text)

    def kernels(self, home: str, *socs: str) -> None:
        """The operator kernels of these SoCs in a CANN home."""
        for soc in socs:
            self.file(f"{home}/opp/built-in/op_impl/ai_core/tbe/kernel/config/{soc}/add.json")

    def npu_smi(self, script: str) -> None:
        self.file("/usr/local/bin/npu-smi", f"#!/bin/sh\n{script}").chmod(0o755)

    def old_cann(self, version: str) -> str:
        """CANN up to 8.3; returns its home."""
        tree = f"{ASCEND}/ascend-toolkit"
        self.file(f"{tree}/{version}/runtime/version.info", f"Version=8.2.0.0.201\nversion_dir={version}\n")
        self.file(f"{tree}/set_env.sh")
        self.file(f"{tree}/{version}/lib64/libascendcl.so")
        self.link(f"{tree}/latest", version)
        self.kernels(f"{tree}/{version}", "ascend910b")
        return f"{tree}/latest"

    def new_cann(self, version: str) -> str:
        """CANN 8.5 and newer; returns its home."""
        home = f"{ASCEND}/cann-{version}"
        self.file(f"{home}/share/info/runtime/version.info", f"Version={version}\nversion_dir=cann-{version}\n")
        self.file(f"{home}/set_env.sh")
        self.file(f"{home}/lib64/libascendcl.so")
        self.link(f"{ASCEND}/cann", f"cann-{version}")
        self.kernels(home, "ascend910b")
        return f"{ASCEND}/cann"

    def source(self, home: str) -> None:
        """What set_env.sh of a CANN home does to the environment."""
        self.environ["ASCEND_HOME_PATH"] = self.environ["ASCEND_TOOLKIT_HOME"] = home
        self.environ["ASCEND_OPP_PATH"] = f"{home}/opp"
        self.environ["PATH"] = f"{home}/bin:/usr/bin:/bin"
        self.environ["PYTHONPATH"] = f"{self.site}:{home}/python/site-packages"
        for folder in (f"{ASCEND}/driver/lib64/driver", f"{ASCEND}/driver/lib64/common", f"{home}/lib64"):
            self._library_path(folder)

    def nnal(self, *, sourced: bool = True) -> None:
        home = f"{ASCEND}/nnal/atb/latest/atb/cxx_abi_1"
        self.file(f"{ASCEND}/nnal/atb/set_env.sh")
        self.file(f"{home}/lib/libatb.so")
        if sourced:
            self.environ["ATB_HOME_PATH"] = home
            self._library_path(f"{home}/lib")

    def _library_path(self, folder: str) -> None:
        before = self.environ.get("LD_LIBRARY_PATH", "")
        self.environ["LD_LIBRARY_PATH"] = f"{folder}:{before}" if before else folder

    def distribution(self, name: str, version: str, *requires: str) -> None:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        folder = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("\n".join(lines) + "\n")

    def module(self, name: str, code: str = "") -> None:
        (self.site / f"{name}.py").write_text(code)

    def torch(self, version: str, code: str = TORCH_ON_CPU) -> None:
        self.distribution("torch", version)
        self.module("torch", f"__version__ = {version!r}\n{code}")

    def torch_npu(self, version: str, code: str = "") -> None:
        self.distribution("torch_npu", version)
        self.module("torch_npu", code)

    def packages(self) -> None:
        """What mm-finetune and wan-infer need beside torch, and what the Python of CANN needs."""
        needs = (("transformers", "5.0.0"), ("megatron-core", "0.16.1"), ("psutil", "7.0.0"), ("zlib-ng", "1.1.0"))
        for name, version in needs:
            self.distribution(name, version)
        for name in CANN_NEEDS:
            self.distribution(name, {"numpy": "1.26.4", "pyyaml": "6.0.2"}.get(name, "3.20.3"))
        for name in WAN_NEEDS:
            self.distribution(name, "99.0")

    def without(self, *names: str) -> None:
        """Removes distributions."""
        for name in names:
            (folder,) = self.site.glob(f"{name.replace('-', '_')}-*.dist-info")
            (folder / "METADATA").unlink()
            folder.rmdir()

    def without_site_packages(self) -> None:
        """Hides the torch and torch_npu that the Python of the tests may have; done where none was made here."""
        self.module("sitecustomize", "import sys\nsys.path[:] = [e for e in sys.path if 'site-packages' not in e]\n")

    def snapshot(self, *, import_seconds: float = 60, command_seconds: float = 60) -> Snapshot:
        if not (self.site / "torch.py").exists():
            self.without_site_packages()
        return collect(
            root=str(self.root),
            environ=self.environ,
            search_path=[str(self.site)],
            import_seconds=import_seconds,
            command_seconds=command_seconds,
        )

    def report(self) -> Report:
        return check(self.snapshot())


def healthy(machine: FakeMachine) -> None:
    """The set that the field's walk-through calls fitting: torch 2.6.0, TorchNPU 7.1.0, CANN 8.2.RC1."""
    machine.npu()
    machine.source(machine.old_cann("8.2.RC1"))
    machine.nnal()
    machine.torch("2.6.0+cpu", TORCH_WITH_NPU)
    machine.torch_npu("2.6.0")
    machine.packages()
