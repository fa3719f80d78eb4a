"""Rules on torch, torch_npu and torchvision."""

from __future__ import annotations

from typing import Iterable

from ascend_envcheck.findings import EVERY_DEVICE, NPU, Finding, Severity
from ascend_envcheck.rules.cann import active_version
from ascend_envcheck.rules.rule import NO_NPU, npu_count
from ascend_envcheck.snapshot import MISSING, NOT_RUN, OK, Snapshot
from ascend_envcheck.tables import DATA_DATE, TorchNpuRow, builds_for, cross_pairing, find_torch_npu, pairings
from ascend_envcheck.versions import cann_version, pin_allows, release, series, torch_pin

_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_TABLE = f"TorchNPU compatibility table, read {DATA_DATE}"
_NOT_TRIED = "the import of torch was not tried"


def version_of(snapshot: Snapshot, name: str) -> str | None:
    """The installed version of a distribution, None when it is not installed."""
    found = snapshot.distributions.get(name)
    return found.version if found else None


def torch_import(snapshot: Snapshot) -> Iterable[Finding]:
    """IMPORT-TORCH: ``import torch`` works in a fresh process."""
    seen = snapshot.imports
    if seen.torch == NOT_RUN:
        yield Finding("IMPORT-TORCH", Severity.SKIP, _NOT_TRIED, doubts=EVERY_DEVICE)
    elif seen.torch == OK:
        yield Finding("IMPORT-TORCH", Severity.INFO, f"torch {seen.torch_version} imports")
    elif seen.torch == MISSING:
        yield Finding(
            "IMPORT-TORCH",
            Severity.FAIL,
            "torch is not installed",
            command=f"pip install torch --index-url {_CPU_INDEX}   # or the torch of your CUDA or torch_npu",
            source="https://pytorch.org/get-started/locally",
            blocks=EVERY_DEVICE,
        )
    elif seen.torch_alone == OK:
        yield Finding(
            "IMPORT-TORCH",
            Severity.FAIL,
            f"`import torch` fails because it loads torch_npu, which is broken here: {seen.torch_detail}",
            command="export TORCH_DEVICE_BACKEND_AUTOLOAD=0   # torch works without torch_npu then, on CPU only",
            source="torch 2.5 and newer import installed device backends by themselves",
            blocks=EVERY_DEVICE,
        )
    else:
        yield Finding(
            "IMPORT-TORCH",
            Severity.FAIL,
            f"`import torch` fails ({seen.torch}): {seen.torch_detail}",
            command="python -X faulthandler -c 'import torch'",
            source="outcome of the import in a child process",
            blocks=EVERY_DEVICE,
        )


def torch_npu_import(snapshot: Snapshot) -> Iterable[Finding]:
    """IMPORT-TORCH-NPU: where there is an NPU, torch_npu is there too and imports."""
    seen, version = snapshot.imports, version_of(snapshot, "torch_npu")
    outcome = seen.torch_npu
    if version is None and outcome != OK:
        yield _without_torch_npu(snapshot)
    elif outcome == OK:
        yield Finding("IMPORT-TORCH-NPU", Severity.INFO, f"torch_npu {version or ''} imports".replace("  ", " "))
    elif outcome == NOT_RUN:
        why = _NOT_TRIED if seen.torch == NOT_RUN else "torch itself does not import"
        yield Finding("IMPORT-TORCH-NPU", Severity.SKIP, why, doubts=(NPU,))
    elif npu_count(snapshot) == 0:
        cause = f"{NO_NPU}; torch_npu {version} does not import here ({outcome}): {seen.torch_npu_detail}"
        yield Finding("IMPORT-TORCH-NPU", Severity.SKIP, cause)
    else:
        yield Finding(
            "IMPORT-TORCH-NPU",
            Severity.FAIL,
            f"torch_npu {version} does not import ({outcome}): {seen.torch_npu_detail or 'no module torch_npu'}",
            command="python -X faulthandler -c 'import torch, torch_npu'",
            source="outcome of the import in a child process",
            blocks=(NPU,),
        )


def _without_torch_npu(snapshot: Snapshot) -> Finding:
    if npu_count(snapshot) == 0:
        return Finding("IMPORT-TORCH-NPU", Severity.SKIP, NO_NPU)
    torch, cann = version_of(snapshot, "torch"), active_version(snapshot)
    row = _build(torch, cann)
    return Finding(
        "IMPORT-TORCH-NPU",
        Severity.FAIL,
        "an NPU is here, torch_npu is not installed: torch sees no NPU",
        command=_install(row, snapshot) if row else "pip install torch_npu   # the build of your torch and CANN",
        source=row.note if row else _TABLE,
        blocks=(NPU,),
    )


def accelerator(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCH-ACCEL: torch has the device interface that the packages use, and it shows the NPU."""
    seen = snapshot.imports
    if seen.torch != OK or seen.accelerator_api is None:
        yield Finding("TORCH-ACCEL", Severity.SKIP, "torch was not imported", doubts=EVERY_DEVICE)
    elif not seen.accelerator_api:
        yield Finding(
            "TORCH-ACCEL",
            Severity.FAIL,
            f"torch {seen.torch_version} has no torch.accelerator, by which mm-finetune finds its device; 2.6 has",
            command=f"pip install 'torch>=2.6' --index-url {_CPU_INDEX}",
            source="torch.accelerator came with torch 2.6",
            blocks=EVERY_DEVICE,
        )
    elif seen.torch_npu == OK and npu_count(snapshot) and seen.device != "npu":
        yield Finding(
            "TORCH-ACCEL",
            Severity.FAIL,
            f"torch_npu imports but shows no NPU: {seen.device_detail or 'torch.accelerator has none'}",
            command="python -c 'import torch, torch_npu; print(torch.npu.device_count()); torch.zeros(1).npu()'",
            source="outcome of torch.accelerator in a child process",
            blocks=(NPU,),
        )
    else:
        found = f"{seen.device_count} x {seen.device}" if seen.device else "none, CPU only"
        yield Finding("TORCH-ACCEL", Severity.INFO, f"torch.accelerator is there; accelerator: {found}")


def torch_npu_pair(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCH-NPU: torch and torch_npu are of one release."""
    torch, torch_npu = version_of(snapshot, "torch"), version_of(snapshot, "torch_npu")
    if torch is None or torch_npu is None:
        missing = "torch_npu" if torch_npu is None else "torch"
        yield Finding("TORCH-NPU", Severity.SKIP, f"{missing} is not installed")
        return
    row = find_torch_npu(torch_npu)
    if release(torch) is None or release(torch_npu) is None:
        cause = f"no release to read in torch {torch!r} and torch_npu {torch_npu!r}"
        yield Finding("TORCH-NPU", Severity.SKIP, cause, doubts=(NPU,))
    elif release(torch) != release(torch_npu):
        build = _build(torch, active_version(snapshot)) or row
        yield Finding(
            "TORCH-NPU",
            Severity.FAIL,
            f"torch {torch} and torch_npu {torch_npu} are of different releases; each torch_npu runs on one torch",
            command=_install(build, snapshot)
            if build
            else f"pip index versions torch_npu   # none is known for {torch!r}",
            source=build.note if build else _TABLE,
            blocks=(NPU,),
        )
    elif row is None:
        cause = f"torch_npu {torch_npu} is not in this tool's table of {DATA_DATE}; it may well be newer"
        yield Finding("TORCH-NPU", Severity.WARN, cause, source=_TABLE, doubts=(NPU,))
    else:
        status = "" if row.status in ("general", "patch") else f", {row.status} build"
        train = f" (TorchNPU {row.release}{status})" if row.release else status
        yield Finding(
            "TORCH-NPU", Severity.INFO, f"torch {torch} and torch_npu {torch_npu}{train} fit", source=row.note
        )


def torch_cann(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCH-CANN: torch_npu and CANN are of one train, or of series that the vendor lets mix."""
    torch_npu, cann = version_of(snapshot, "torch_npu"), active_version(snapshot)
    row = find_torch_npu(torch_npu) if torch_npu else None
    missing = _unjudged(snapshot, torch_npu, cann, row)
    if missing is not None or row is None or cann is None:
        yield missing or Finding("TORCH-CANN", Severity.SKIP, "nothing to compare")
        return
    pairing = cross_pairing(row, cann)
    if cann_version(row.cann) == cann:
        cause = f"torch_npu {row.torch_npu} was made for CANN {cann}"
        yield Finding("TORCH-CANN", Severity.INFO, cause, source=row.note)
    elif pairing is not None:
        cause = (
            f"torch_npu {row.torch_npu} was made for CANN {row.cann}; TorchNPU {pairing.of} runs on {pairing.fits} too"
        )
        yield Finding("TORCH-CANN", Severity.INFO, cause, source=f"{pairing.source} ({pairing.confidence})")
    else:
        builds = builds_for(row.torch, cann)
        yield Finding(
            "TORCH-CANN",
            Severity.WARN,
            f"torch_npu {row.torch_npu} was made for CANN {row.cann}, here is CANN {cann}: nobody vouches for the pair",
            command=_install(builds[0], snapshot) if builds else f"./Ascend-cann-toolkit_{row.cann}_*.run --install",
            source=row.note,
            doubts=(NPU,),
        )


def _unjudged(snapshot: Snapshot, torch_npu: str | None, cann: str | None, row: TorchNpuRow | None) -> Finding | None:
    doubts = (NPU,) if npu_count(snapshot) else ()
    if torch_npu is None:
        return Finding("TORCH-CANN", Severity.SKIP, "torch_npu is not installed")
    if not snapshot.cann_homes:
        return Finding("TORCH-CANN", Severity.SKIP, "no CANN was found")
    if cann is None:
        return Finding("TORCH-CANN", Severity.SKIP, "the version of CANN can't be read", doubts=doubts)
    if row is None or not row.cann:
        cause = f"no source says for which CANN torch_npu {torch_npu} was made"
        return Finding("TORCH-CANN", Severity.SKIP, cause, doubts=doubts)
    return None


def torchvision(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCHVISION: an installed torchvision was built for this torch; transformers imports it where it is."""
    torch, vision = version_of(snapshot, "torch"), version_of(snapshot, "torchvision")
    if torch is None or vision is None:
        missing = "torchvision" if vision is None else "torch"
        yield Finding("TORCHVISION", Severity.SKIP, f"{missing} is not installed")
        return
    pins = [torch_pin(line) for line in snapshot.distributions["torchvision"].requires]
    pin = next((found for found in pins if found), None)
    row = next((pair for pair in pairings("torchvision") if pair.of == series(torch)), None)
    if pin is None and row is None:
        cause = f"torchvision {vision} names no torch, and no table tells which torchvision goes with torch {torch}"
        yield Finding("TORCHVISION", Severity.SKIP, cause)
    elif pin_allows(pin, torch) if pin else row is not None and series(vision) == row.fits:
        yield Finding("TORCHVISION", Severity.INFO, f"torchvision {vision} goes with torch {torch}")
    else:
        wanted = f"torch {pin}" if pin else f"another torch (torch {torch} goes with {row.fits if row else '?'})"
        install = f"pip install --no-deps 'torchvision=={row.fits}.*'" if row else "pip uninstall -y torchvision"
        yield Finding(
            "TORCHVISION",
            Severity.FAIL,
            f"torchvision {vision} was built for {wanted}, torch is {torch}: no `torchvision::nms` operator",
            command=f"{install} --index-url {_CPU_INDEX}" if row and _is_x86_cpu(snapshot, torch) else install,
            source=f"{row.source} ({row.confidence})" if row and not pin else f"Requires-Dist of torchvision {vision}",
            blocks=EVERY_DEVICE,
        )


def _build(torch: str | None, cann: str | None) -> TorchNpuRow | None:
    """The newest torch_npu on PyPI for this torch, for this CANN too when there is one."""
    builds = builds_for(torch or "", cann) or builds_for(torch or "")
    return builds[0] if builds else None


def _install(row: TorchNpuRow, snapshot: Snapshot) -> str:
    """The pip line of a pair; x86-64 wheels up to 2.11 ask for torch==X+cpu, which only PyTorch's own index has."""
    old = (release(row.torch) or (0, 0, 0)) < (2, 12, 0)
    if old and snapshot.python.machine == "x86_64":
        return f"pip install torch=={row.torch}+cpu torch_npu=={row.torch_npu} --extra-index-url {_CPU_INDEX}"
    return f"pip install torch=={row.torch} torch_npu=={row.torch_npu}"


def _is_x86_cpu(snapshot: Snapshot, torch: str) -> bool:
    return snapshot.python.machine == "x86_64" and torch.endswith("+cpu")
