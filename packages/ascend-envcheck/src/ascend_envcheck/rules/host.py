"""Rules on the interpreter and on the packages around torch."""

from __future__ import annotations

from typing import Iterable

from ascend_envcheck.findings import EVERY_DEVICE, NPU, Finding, Severity
from ascend_envcheck.snapshot import Snapshot
from ascend_envcheck.tables import find_torch_npu
from ascend_envcheck.versions import release

OLDEST_PYTHON = (3, 10, 0)
OLDEST_TRANSFORMERS = (4, 49, 0)


def python_version(snapshot: Snapshot) -> Iterable[Finding]:
    """PY-VER: the packages need 3.10, an installed torch_npu has its own span."""
    version = snapshot.python.version
    given = release(version)
    if given is None:
        yield Finding("PY-VER", Severity.SKIP, f"no Python version to read in {version!r}", doubts=EVERY_DEVICE)
    elif given < OLDEST_PYTHON:
        yield Finding(
            "PY-VER",
            Severity.FAIL,
            f"Python {version}: mm-finetune and its siblings need 3.10 or newer",
            command="conda create -y -n ascend python=3.11 && conda activate ascend",
            source="requires-python of mm-finetune",
            blocks=EVERY_DEVICE,
        )
    else:
        yield _python_of_torch_npu(snapshot, f"{given[0]}.{given[1]}") or Finding(
            "PY-VER", Severity.INFO, f"Python {version} is new enough (3.10)"
        )


def _python_of_torch_npu(snapshot: Snapshot, python: str) -> Finding | None:
    installed = snapshot.distributions.get("torch_npu")
    row = find_torch_npu(installed.version) if installed else None
    if row is None or not row.python_documented:
        return None
    if row.supports(python):
        return Finding("PY-VER", Severity.INFO, f"Python {python} fits torch_npu {row.torch_npu}", source=row.note)
    return Finding(
        "PY-VER",
        Severity.WARN,
        f"Python {python}: torch_npu {row.torch_npu} is documented for {row.python_documented}",
        command="conda create -y -n ascend python=3.11 && conda activate ascend",
        source=row.note,
        doubts=(NPU,),
    )


def packages(snapshot: Snapshot) -> Iterable[Finding]:
    """MM-PACKAGES: what mm-finetune imports beside torch.

    A WARN, though it decides the verdict: a machine without them is fit for everything else.
    """
    transformers = snapshot.distributions.get("transformers")
    megatron = snapshot.distributions.get("megatron-core")
    missing: list[str] = []
    if transformers is None:
        missing.append("transformers is not installed")
    elif (release(transformers.version) or OLDEST_TRANSFORMERS) < OLDEST_TRANSFORMERS:
        missing.append(f"transformers {transformers.version} does not know Qwen2.5-VL, 4.49 and newer do")
    if megatron is None:
        missing.append("megatron-core is not installed")
    for cause in missing:
        yield Finding(
            "MM-PACKAGES",
            Severity.WARN,
            cause,
            command="pip install mm-finetune",
            source="dependencies of mm-finetune; Qwen2.5-VL came with transformers 4.49",
            blocks=EVERY_DEVICE,
        )
    if transformers and megatron and not missing:
        cause = f"transformers {transformers.version} and megatron-core {megatron.version} are installed"
        yield Finding("MM-PACKAGES", Severity.INFO, cause)


def psutil(snapshot: Snapshot) -> Iterable[Finding]:
    """MM-PSUTIL: megatron-core needs it and does not declare it."""
    if "megatron-core" not in snapshot.distributions:
        yield Finding("MM-PSUTIL", Severity.SKIP, "megatron-core is not installed")
    elif "psutil" in snapshot.distributions:
        yield Finding("MM-PSUTIL", Severity.INFO, "psutil is installed beside megatron-core")
    else:
        yield Finding(
            "MM-PSUTIL",
            Severity.FAIL,
            "psutil is missing beside megatron-core: saving a checkpoint waits for ever for a writer that died",
            command="pip install psutil",
            source="megatron-core dist_checkpointing imports psutil in its writer process without declaring it",
            blocks=EVERY_DEVICE,
        )
