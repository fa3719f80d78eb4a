"""Rules on what a child process saw when it imported torch and torch_npu, and when it computed."""

from __future__ import annotations

from typing import Iterable

from ascend_envcheck.findings import EVERY_DEVICE, NPU, Finding, Severity
from ascend_envcheck.messages import joined, say
from ascend_envcheck.rules.cann import active_version
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.rules.torch_stack import TABLE, build_for, is_x86_cpu, version_of
from ascend_envcheck.snapshot import MISSING, NOT_RUN, OK, Snapshot
from ascend_envcheck.tables import CPU_INDEX, pip_install

_NOT_TRIED = say("the import of torch was not tried", "未尝试导入 torch")
_SEEN = "outcome of the import in a child process"


def torch_import(snapshot: Snapshot) -> Iterable[Finding]:
    """IMPORT-TORCH: ``import torch`` works in a fresh process."""
    seen = snapshot.imports
    if seen.torch == NOT_RUN:
        yield Finding("IMPORT-TORCH", Severity.SKIP, _NOT_TRIED, doubts=EVERY_DEVICE)
    elif seen.torch == OK:
        cause = say("torch {version} imports", "torch {version} 可以导入", version=seen.torch_version)
        yield Finding("IMPORT-TORCH", Severity.INFO, cause)
    elif seen.torch == MISSING:
        yield Finding(
            "IMPORT-TORCH",
            Severity.FAIL,
            say("torch is not installed", "未安装 torch"),
            command=f"pip install torch --index-url {CPU_INDEX}   # or the torch of your CUDA or torch_npu",
            source="https://pytorch.org/get-started/locally",
            blocks=EVERY_DEVICE,
        )
    elif seen.torch_alone == OK:
        yield Finding(
            "IMPORT-TORCH",
            Severity.FAIL,
            say(
                "`import torch` fails because it loads torch_npu, which is broken here: {why}",
                "`import torch` 失败，因为它会自动加载 torch_npu，而后者在此处不可用：{why}",
                why=_explained(seen.torch_detail),
            ),
            command="export TORCH_DEVICE_BACKEND_AUTOLOAD=0   # torch works without torch_npu then, on CPU only",
            source="torch 2.5 and newer import installed device backends by themselves",
            blocks=EVERY_DEVICE,
        )
    else:
        yield Finding(
            "IMPORT-TORCH",
            Severity.FAIL,
            say(
                "`import torch` fails: {why}",
                "`import torch` 失败：{why}",
                why=_explained(seen.torch_detail) or seen.torch,
            ),
            command="python -X faulthandler -c 'import torch'",
            source=_SEEN,
            blocks=EVERY_DEVICE,
        )


def torch_npu_import(snapshot: Snapshot) -> Iterable[Finding]:
    """IMPORT-TORCH-NPU: where there is an NPU, torch_npu is there too and imports."""
    seen, version = snapshot.imports, version_of(snapshot, "torch_npu")
    outcome = seen.torch_npu
    values = {"version": version, "why": _explained(seen.torch_npu_detail) or "no module torch_npu"}
    if version is None and outcome != OK:
        yield _without_torch_npu(snapshot)
    elif outcome == OK:
        cause = say("torch_npu {version} imports", "torch_npu {version} 可以导入", version=version or "?")
        yield Finding("IMPORT-TORCH-NPU", Severity.INFO, cause)
    elif outcome == NOT_RUN:
        why = _NOT_TRIED if seen.torch == NOT_RUN else say("torch itself does not import", "torch 本身无法导入")
        yield Finding("IMPORT-TORCH-NPU", Severity.SKIP, why, doubts=(NPU,))
    elif npu_count(snapshot) == 0:
        cause = say(
            "no NPU was found; torch_npu {version} does not import here: {why}",
            "没有找到 NPU；torch_npu {version} 在此无法导入：{why}",
            **values,
        )
        yield Finding("IMPORT-TORCH-NPU", Severity.SKIP, cause)
    else:
        yield Finding(
            "IMPORT-TORCH-NPU",
            Severity.FAIL,
            say(
                "torch_npu {version} does not import: {why}",
                "torch_npu {version} 无法导入：{why}",
                **values,
            ),
            command="python -X faulthandler -c 'import torch, torch_npu'",
            source=_SEEN,
            blocks=(NPU,),
        )


def _explained(error: str) -> str:
    """The last line of an error, and what it means where the table of failures knows that."""
    from ascend_envcheck.failures import ROOT, match  # a thousand lines of table, read where something failed

    known = match(error)
    if known is None or known.tier != ROOT:
        return error
    return say("{error} ({id}: {cause})", "{error}（{id}：{cause}）", error=error, id=known.id, cause=known.cause)


def _without_torch_npu(snapshot: Snapshot) -> Finding:
    if npu_count(snapshot) == 0:
        return Finding("IMPORT-TORCH-NPU", Severity.SKIP, NO_NPU)
    row = build_for(version_of(snapshot, "torch"), active_version(snapshot))
    return Finding(
        "IMPORT-TORCH-NPU",
        Severity.FAIL,
        say(
            "an NPU is here, torch_npu is not installed: torch sees no NPU",
            "存在 NPU，但未安装 torch_npu：torch 看不到 NPU",
        ),
        command=pip_install(row, snapshot.python.machine)
        if row
        else "pip install torch_npu   # the build of your torch and CANN",
        source=row.note if row else TABLE,
        blocks=(NPU,),
    )


def accelerator(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCH-ACCEL: torch has the device interface that the packages use, and it shows the NPU."""
    seen = snapshot.imports
    if seen.torch != OK or seen.accelerator_api is None:
        cause = _NOT_TRIED if seen.torch == NOT_RUN else say("torch was not imported", "未导入 torch")
        yield Finding("TORCH-ACCEL", Severity.SKIP, cause, doubts=EVERY_DEVICE)
    elif not seen.accelerator_api:
        yield Finding(
            "TORCH-ACCEL",
            Severity.FAIL,
            say(
                "torch {version} has no torch.accelerator, by which mm-finetune and wan-infer find their device; "
                "2.6 has",
                "torch {version} 没有 torch.accelerator，mm-finetune 与 wan-infer 依靠它选择设备；2.6 起提供",
                version=seen.torch_version,
            ),
            command=_newer_torch(snapshot),
            source="torch.accelerator came with torch 2.6",
            blocks=EVERY_DEVICE,
        )
    elif seen.torch_npu == OK and npu_count(snapshot) and seen.device != "npu":
        yield Finding(
            "TORCH-ACCEL",
            Severity.FAIL,
            say(
                "torch_npu imports but shows no NPU: {why}",
                "torch_npu 可以导入，但看不到 NPU：{why}",
                why=_explained(seen.device_detail) or say("torch.accelerator has none", "torch.accelerator 中没有"),
            ),
            command="python -c 'import torch, torch_npu; print(torch.npu.device_count()); torch.zeros(1).npu()'",
            source="outcome of torch.accelerator in a child process",
            blocks=(NPU,),
        )
    else:
        found = f"{seen.device_count} x {seen.device}" if seen.device else say("none, CPU only", "无，仅 CPU")
        cause = say(
            "torch.accelerator is there; accelerator: {found}", "torch.accelerator 可用；加速器：{found}", found=found
        )
        yield Finding("TORCH-ACCEL", Severity.INFO, cause)


def _newer_torch(snapshot: Snapshot) -> str:
    """A torch alone would part it from torch_npu, and one of the CPU index would take CUDA away."""
    if version_of(snapshot, "torch_npu") is not None:
        return "ascend-envcheck matrix --solve   # torch and torch_npu are upgraded together"
    of_cpu = is_x86_cpu(snapshot, snapshot.imports.torch_version)
    return "pip install 'torch>=2.6'" + (f" --index-url {CPU_INDEX}" if of_cpu else "")


def smoke(snapshot: Snapshot) -> Iterable[Finding]:
    """SMOKE: the accelerators compute, and reach each other; only when asked for."""
    seen = snapshot.command("smoke")
    steps = [line[len("done: ") :] for line in seen.output.splitlines() if line.startswith("done: ")]
    done = joined(steps, ", ", "、") if steps else say("nothing", "无")
    if seen.outcome == NOT_RUN:
        yield Finding("SMOKE", Severity.SKIP, say("not asked for; --smoke", "未要求；可使用 --smoke"))
    elif seen.outcome == MISSING:
        yield Finding(
            "SMOKE", Severity.SKIP, say("nothing to compute on: {why}", "没有可用的设备：{why}", why=seen.detail)
        )
    elif seen.outcome == OK:
        yield Finding("SMOKE", Severity.INFO, say("computed: {done}", "已计算：{done}", done=done))
    else:
        yield Finding(
            "SMOKE",
            Severity.FAIL,
            say(
                "a small computation failed ({outcome}) after {done}: {why}",
                "小规模计算失败（{outcome}），已完成：{done}；原因：{why}",
                outcome=seen.outcome,
                done=done,
                why=seen.detail,
            ),
            command="ASCEND_LAUNCH_BLOCKING=1 ASCEND_SLOG_PRINT_TO_STDOUT=1 ascend-envcheck check --smoke --only SMOKE",
            source="outcome in a child process",
            blocks=(snapshot.imports.device,) if snapshot.imports.device in EVERY_DEVICE else (),
        )


_NPU = (NPU,)

RULES = (
    Rule(
        "IMPORT-TORCH",
        say("torch imports", "torch 可以导入"),
        torch_import,
        "python",
        EVERY_DEVICE,
        needs_import=True,
    ),
    Rule(
        "IMPORT-TORCH-NPU",
        say("torch_npu is there and imports", "torch_npu 已安装且可导入"),
        torch_npu_import,
        "python",
        _NPU,
        needs_import=True,
    ),
    Rule(
        "TORCH-ACCEL",
        say("torch.accelerator is there, and shows the NPU", "torch.accelerator 可用，并能看到 NPU"),
        accelerator,
        "python",
        EVERY_DEVICE,
        needs_import=True,
    ),
    Rule(
        "SMOKE",
        say("the accelerators compute and reach each other", "加速器可以计算并互相通信"),
        smoke,
        "python",
        needs_import=True,
    ),
)
