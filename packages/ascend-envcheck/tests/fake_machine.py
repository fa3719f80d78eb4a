"""A machine made of files: devices, npu-smi, CANN, NNAL, and a Python with fake torch modules.

The layouts follow the vendor's documents: CANN up to 8.3 in ``ascend-toolkit/<version>`` with ``latest`` beside it and
``runtime/version.info``; 8.5 and newer in ``cann-<version>`` with ``share/info/runtime/version.info``.
"""

from __future__ import annotations

from pathlib import Path

from ascend_envcheck import Report, Snapshot, check, collect

ASCEND = "/usr/local/Ascend"

TABLE = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.0                   Version: 24.1.0                                               |
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

    def npu(self, table: str = TABLE) -> None:
        for name in ("davinci0", "davinci_manager", "devmm_svm", "hisi_hdc"):
            self.file(f"/dev/{name}")
        self.npu_smi(f"cat <<'END'\n{table}END\n")

    def npu_smi(self, script: str) -> None:
        self.file("/usr/local/bin/npu-smi", f"#!/bin/sh\n{script}").chmod(0o755)

    def old_cann(self, version: str) -> str:
        """CANN up to 8.3; returns its home."""
        tree = f"{ASCEND}/ascend-toolkit"
        self.file(f"{tree}/{version}/runtime/version.info", f"Version=8.2.0.0.201\nversion_dir={version}\n")
        self.file(f"{tree}/set_env.sh")
        self.file(f"{tree}/{version}/lib64/libascendcl.so")
        self.link(f"{tree}/latest", version)
        return f"{tree}/latest"

    def new_cann(self, version: str) -> str:
        """CANN 8.5 and newer; returns its home."""
        home = f"{ASCEND}/cann-{version}"
        self.file(f"{home}/share/info/runtime/version.info", f"Version={version}\nversion_dir=cann-{version}\n")
        self.file(f"{home}/set_env.sh")
        self.file(f"{home}/lib64/libascendcl.so")
        self.link(f"{ASCEND}/cann", f"cann-{version}")
        return f"{ASCEND}/cann"

    def source(self, home: str) -> None:
        """What set_env.sh of a CANN home does to the environment."""
        self.environ["ASCEND_HOME_PATH"] = self.environ["ASCEND_TOOLKIT_HOME"] = home
        self._library_path(f"{home}/lib64")

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
        """What mm-finetune needs beside torch."""
        for name, version in (("transformers", "5.0.0"), ("megatron-core", "0.16.1"), ("psutil", "7.0.0")):
            self.distribution(name, version)

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
