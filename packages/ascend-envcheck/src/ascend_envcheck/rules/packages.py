"""Rules on the packages around torch: what the tasks import, what others pin, and what was made for CUDA."""

from __future__ import annotations

from typing import Iterable, Mapping, NamedTuple, Sequence

from ascend_envcheck.findings import EVERY_DEVICE, INFER, NPU, TRAIN, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.rules.cann import active_version
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.rules.torch_stack import not_installed, version_of
from ascend_envcheck.snapshot import Snapshot
from ascend_envcheck.tables import find_torch_npu, records
from ascend_envcheck.versions import Release, cann_version, release, series


class Need(NamedTuple):
    """A distribution, from the first release that does to the first that does not."""

    name: str
    first: Release
    beyond: Release | None = None

    def __str__(self) -> str:
        beyond = f",<{self.beyond[0]}.{self.beyond[1]}" if self.beyond else ""
        return f"{self.name}>={self.first[0]}.{self.first[1]}{beyond}"


# As the packages declare them.
_MM_FINETUNE = (
    Need("transformers", (5, 0, 0), (6, 0, 0)),
    Need("megatron-core", (0, 16, 0), (0, 17, 0)),
    Need("numpy", (1, 26, 0)),
    Need("pillow", (10, 0, 0)),
    Need("pyyaml", (6, 0, 0)),
    Need("safetensors", (0, 5, 0)),
    Need("tqdm", (4, 66, 0)),
    Need("zlib-ng", (0, 5, 0)),
)
_WAN_INFER = (
    Need("transformers", (5, 0, 0), (6, 0, 0)),
    Need("numpy", (1, 26, 0)),
    Need("safetensors", (0, 5, 0)),
    Need("ftfy", (6, 2, 0)),
    Need("pillow", (10, 0, 0)),
    Need("av", (13, 0, 0)),
    Need("tqdm", (4, 66, 0)),
)

_CUDA_ONLY = ("flash-attn", "transformer-engine", "bitsandbytes", "xformers")


def mm_finetune(snapshot: Snapshot) -> Iterable[Finding]:
    """MM-PACKAGES: what mm-finetune imports beside torch.

    A WARN, though it decides the verdict: a machine without them is fit for everything else.
    """
    yield from _needed(snapshot, "MM-PACKAGES", "mm-finetune", _MM_FINETUNE)


def wan_infer(snapshot: Snapshot) -> Iterable[Finding]:
    """WAN-PACKAGES: what wan-infer imports beside torch; a WARN as MM-PACKAGES."""
    yield from _needed(snapshot, "WAN-PACKAGES", "wan-infer", _WAN_INFER)


def _needed(snapshot: Snapshot, id: str, package: str, needs: Sequence[Need]) -> Iterable[Finding]:
    lacking = [need.name for need in needs if version_of(snapshot, need.name) is None]
    are, names = "is" if len(lacking) == 1 else "are", joined(lacking, ", ", "、")
    faults = [say("{names} {are} not installed", "未安装 {names}", names=names, are=are)] if lacking else []
    faults += [fault for fault in (_fault(snapshot, need) for need in needs) if fault is not None]
    if not faults:
        cause = say("the packages that {package} imports are here", "{package} 所需的软件包齐全", package=package)
        yield Finding(id, Severity.INFO, cause)
        return
    yield Finding(
        id,
        Severity.WARN,
        say(
            "{package} can't run: {faults}",
            "{package} 无法运行：{faults}",
            package=package,
            faults=joined(faults),
        ),
        command=f"pip install {package}",
        source=f"dependencies of {package}",
        blocks=EVERY_DEVICE,
    )


def _fault(snapshot: Snapshot, need: Need) -> Message | None:
    version = version_of(snapshot, need.name)
    given = release(version or "")
    if given is None or (need.first <= given and (need.beyond is None or given < need.beyond)):
        return None
    return say(
        "{name} is {version}, needed is {need}",
        "{name} 为 {version}，需要 {need}",
        name=need.name,
        version=version,
        need=need,
    )


def psutil(snapshot: Snapshot) -> Iterable[Finding]:
    """MM-PSUTIL: megatron-core needs it and does not declare it."""
    if "megatron-core" not in snapshot.distributions:
        yield Finding("MM-PSUTIL", Severity.SKIP, not_installed("megatron-core"))
    elif "psutil" in snapshot.distributions:
        cause = say("psutil is installed beside megatron-core", "megatron-core 旁已安装 psutil")
        yield Finding("MM-PSUTIL", Severity.INFO, cause)
    else:
        yield Finding(
            "MM-PSUTIL",
            Severity.FAIL,
            say(
                "psutil is missing beside megatron-core: saving a checkpoint waits for ever for a writer that died",
                "megatron-core 旁缺少 psutil：保存检查点时会一直等待已退出的写进程",
            ),
            command="pip install psutil",
            source="megatron-core dist_checkpointing imports psutil in its writer process without declaring it",
            blocks=EVERY_DEVICE,
        )


def pins(snapshot: Snapshot) -> Iterable[Finding]:
    """PKG-PIN: the versions that MindIE-SD, MindSpeed-MM and vllm-ascend were released with."""
    judged = False
    for package, distribution, table, columns in _PINNED:
        version = version_of(snapshot, distribution)
        if version is None:
            continue
        judged = True
        rows = [row for row in records(table) if release(row[table]) == release(version)]
        row = next((row for row in rows if row[table] == version), rows[0] if rows else None)
        yield _pinned(snapshot, package, version, row, columns)
    if not judged:
        cause = say(
            "none of MindIE-SD, MindSpeed-MM and vllm-ascend is installed",
            "未安装 MindIE-SD、MindSpeed-MM 或 vllm-ascend",
        )
        yield Finding("PKG-PIN", Severity.SKIP, cause)


_MINDIE_PINS = ("diffusers", "transformers", "accelerate", "numpy", "av")

_LABELS = {"cann": "CANN", "torch_npu_release": "TorchNPU", "triton_ascend": "triton-ascend"}

_PINNED = (
    ("MindIE-SD", "mindiesd", "mindie_sd", _MINDIE_PINS),
    ("MindSpeed-MM", "mindspeed-mm", "mindspeed_mm", ("torch", "torch_npu_release", "cann", "triton_ascend")),
    ("vllm-ascend", "vllm-ascend", "vllm_ascend", ("vllm", "torch", "torch_npu", "cann", "triton_ascend")),
)
"""What it is called, its distribution, its table (whose first column has that name too), and the columns that pin."""


def _pinned(
    snapshot: Snapshot, package: str, version: str, row: Mapping[str, str] | None, columns: Sequence[str]
) -> Finding:
    values = {"package": package, "version": version}
    if row is None:
        cause = say("{package} {version} is unknown to this tool", "本工具不认识 {package} {version}", **values)
        return Finding("PKG-PIN", Severity.SKIP, cause)
    source = f"{row['source']} ({row['confidence']})"
    others = [other for other in (_other(snapshot, name, row[name].split()) for name in columns) if other is not None]
    if not others:
        cause = say("the versions fit {package} {version}", "各版本与 {package} {version} 配套", **values)
        return Finding("PKG-PIN", Severity.INFO, cause, source=source)
    return Finding(
        "PKG-PIN",
        Severity.WARN,
        say(
            "{package} {version} was released with {others}",
            "{package} {version} 发布时配套的是 {others}",
            others=joined(others, ", ", "，"),
            **values,
        ),
        command=_command(package, row),
        source=source,
    )


def _command(package: str, row: Mapping[str, str]) -> str:
    """What brings the versions of a row; an environment of its own keeps them from those of other packages."""
    if package == "MindSpeed-MM":
        return f"ascend-envcheck matrix --mindspeed_mm {row['mindspeed_mm']} --solve"
    names = _MINDIE_PINS if package == "MindIE-SD" else ("vllm", "torch_npu")
    wanted = " ".join(f"{name}=={row[name]}" for name in names)
    return f"pip install {wanted}   # in an environment of its own"


def _other(snapshot: Snapshot, name: str, wanted: Sequence[str]) -> Message | None:
    """What is here instead of what a row names; None when it fits, or is not here."""
    found = _found(snapshot, name)
    if not wanted or found is None or any(_equal(name, found, each) for each in wanted):
        return None
    return say(
        "{name} {wanted} (here {found})",
        "{name} {wanted}（此处为 {found}）",
        name=_LABELS.get(name, name),
        found=found,
        wanted=" / ".join(wanted),
    )


def _found(snapshot: Snapshot, name: str) -> str | None:
    if name == "cann":
        return active_version(snapshot)
    if name == "torch_npu_release":
        row = find_torch_npu(version_of(snapshot, "torch_npu") or "")
        return row.release or None if row else None
    return version_of(snapshot, name if name == "torch_npu" else name.replace("_", "-"))


def _equal(name: str, found: str, wanted: str) -> bool:
    if name == "cann":
        return cann_version(found) == cann_version(wanted)
    if name == "torch_npu_release":
        return series(found) == series(wanted)  # patches of a train replace it
    if name == "torch_npu":
        return found.partition("+")[0] == wanted.partition("+")[0]
    return release(found) == release(wanted)


def cuda_only(snapshot: Snapshot) -> Iterable[Finding]:
    """NO-CUDA-ONLY: no package that is made for CUDA stands in the way of the NPU."""
    present = [name for name in _CUDA_ONLY if name in snapshot.distributions]
    if npu_count(snapshot) == 0:
        yield Finding("NO-CUDA-ONLY", Severity.SKIP, NO_NPU)
    elif not present:
        cause = say("no package here is made for CUDA only", "没有仅面向 CUDA 的软件包")
        yield Finding("NO-CUDA-ONLY", Severity.INFO, cause)
    for name in present if npu_count(snapshot) else ():
        fatal = name == "transformer-engine" and "megatron-core" in snapshot.distributions
        yield Finding(
            "NO-CUDA-ONLY",
            Severity.FAIL if fatal else Severity.WARN,
            say(
                "{name} {version} is made for CUDA: {outcome}",
                "{name} {version} 仅面向 CUDA：{outcome}",
                name=name,
                version=version_of(snapshot, name),
                outcome=say("megatron-core imports it, and fails", "megatron-core 会导入它并失败")
                if fatal
                else say("what finds it may choose it, and fails on the NPU", "依赖方可能会选用它，在 NPU 上失败"),
            ),
            command=f"pip uninstall -y {name}",
            source="MindSpeed-MM FAQ; flash_attn and transformer_engine hold CUDA kernels",
            blocks=(NPU,) if fatal else (),
            tasks=(TRAIN,) if fatal else (TRAIN, INFER),
        )


RULES = (
    Rule(
        "MM-PACKAGES",
        say("what mm-finetune imports is installed", "已安装 mm-finetune 所需的软件包"),
        mm_finetune,
        "python",
        EVERY_DEVICE,
        (TRAIN,),
    ),
    Rule(
        "MM-PSUTIL",
        say("psutil is installed beside megatron-core", "megatron-core 旁已安装 psutil"),
        psutil,
        "python",
        EVERY_DEVICE,
        (TRAIN,),
    ),
    Rule(
        "WAN-PACKAGES",
        say("what wan-infer imports is installed", "已安装 wan-infer 所需的软件包"),
        wan_infer,
        "python",
        EVERY_DEVICE,
        (INFER,),
    ),
    Rule(
        "PKG-PIN",
        say(
            "versions are those that MindIE-SD, MindSpeed-MM, vllm-ascend name",
            "版本与 MindIE-SD、MindSpeed-MM、vllm-ascend 的要求一致",
        ),
        pins,
        "python",
    ),
    Rule(
        "NO-CUDA-ONLY",
        say("no package made for CUDA stands in the way", "没有仅面向 CUDA 的软件包妨碍 NPU"),
        cuda_only,
        "python",
        (NPU,),
    ),
)
