"""The steps that install a set of versions, in the only order that works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Mapping

from ascend_envcheck.messages import say
from ascend_envcheck.tables import CPU_INDEX, TorchNpuRow, find_torch_npu, pip_install, records, torch_requirement
from ascend_envcheck.versions import cann_order, release

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ascend_envcheck.compat.solver import Solution

ASCEND = "/usr/local/Ascend"
"""Where the vendor's packages install themselves by default, as root."""

PACKAGE_OF: Mapping[str, str] = {
    "ascend910b": "910b",
    "ascend910_93": "A3",
    "ascend310p": "310p",
    "ascend910": "910",
    "ascend310b": "310b",
    "ascend950": "950",
}
"""How the vendor's file names call a SoC."""

_SPLIT_OPS = "8.5.0"  # from here on: <Ascend>/cann, and operators in packages Ascend-cann-<soc>-ops
_KERNELS_BY_MACHINE = "8.0.RC3"  # up to 8.0.RC2 the name of a kernels package may end in _linux.run
_NUMPY_2 = (2, 3, 0)  # torch 2.3 is the first that was built for numpy 2


@dataclass(frozen=True)
class Step:
    """One step: what is done, the commands to copy, and why it stands here."""

    title: str
    commands: tuple[str, ...]
    why: str = ""


def set_env(cann: str) -> str:
    """The set_env.sh of a toolkit that was installed to the default place."""
    return f"{ASCEND}/cann/set_env.sh" if _is_split(cann) else f"{ASCEND}/ascend-toolkit/set_env.sh"


def steps(found: Solution) -> tuple[Step, ...]:
    """All steps from a bare machine to the set."""
    row = find_torch_npu(found.torch_npu)
    assert row is not None, f"torch_npu {found.torch_npu} of a solution is not in the table"
    return (
        *_driver(found),
        *_cann(found),
        _python(found),
        _torch(found, row),
        *_nnal(found),
        *_stacks(found),
        Step(say("Check what came of it", "检查安装结果"), ("ascend-envcheck check",)),
    )


def _driver(found: Solution) -> Iterator[Step]:
    soc, version = PACKAGE_OF[found.soc or "ascend910b"], _driver_version(found.hdk[0] if found.hdk else "")
    machine = {"x86_64": "x86-64", "aarch64": "aarch64"}.get(found.machine, "*")  # as the driver's files spell it
    yield Step(
        say(
            "Driver and firmware: Ascend HDK {hdk} (as root)",
            "驱动和固件：Ascend HDK {hdk}（使用 root 用户）",
            hdk=found.hdk[0] if found.hdk else "?",
        ),
        (
            f"bash ./Ascend-hdk-{soc}-npu-driver_{version}_linux-{machine}.run --full --force",
            f"bash ./Ascend-hdk-{soc}-npu-firmware_*.run --full",
        ),
        say(
            "both from one HDK; {others} fit too. A container uses those of its host",
            "两者须来自同一个 HDK；{others} 也配套。容器使用宿主机的驱动",
            others=", ".join(found.hdk[1:4]),
        )
        if found.hdk[1:]
        else say(
            "both from one HDK; a container uses those of its host",
            "两者须来自同一个 HDK；容器使用宿主机的驱动",
        ),
    )
    yield Step(
        say("Reboot, if the driver or the firmware was updated", "若更新了驱动或固件，请重启"),
        ("reboot", "npu-smi info"),
        say("the old driver stays in memory until then", "重启之前内存中仍是旧驱动"),
    )


def _driver_version(hdk: str) -> str:
    """As in a file name: 25.0.RC1 is 25.0.rc1.1 or the like there, 25.5.x any 25.5."""
    return (hdk[:-1] if hdk.endswith(".x") else hdk).lower() + "*"


def _cann(found: Solution) -> Iterator[Step]:
    version, machine = found.cann, found.machine or "$(uname -m)"
    yield Step(
        say("CANN toolkit {version}", "CANN toolkit {version}", version=version),
        (f"bash ./Ascend-cann-toolkit_{version}_linux-{machine}.run --install",),
        say("after the driver, which it looks for", "须在驱动之后安装，安装时会检查驱动"),
    )
    yield Step(
        say("Operators of the SoC, of the same version", "对应 SoC 的算子包，版本须一致"),
        (f"bash ./{operators(version, found.soc or 'ascend910b', machine)} --install",),
        ""
        if found.soc
        else say(
            "named here for 910B (Atlas A2); other SoCs have packages of their own",
            "此处以 910B（Atlas A2）为例；其他 SoC 有各自的算子包",
        ),
    )
    yield Step(
        say("CANN's environment, in every new shell", "CANN 环境变量，每个新 shell 都需要"),
        (f"source {set_env(version)}",),
    )


def operators(cann: str, soc: str, machine: str) -> str:
    """The file that holds the compiled operators of a SoC: a kernels package, from CANN 8.5 on an ops package."""
    name = PACKAGE_OF[soc]
    if _is_split(cann):
        return f"Ascend-cann-{name}-ops_{cann}_linux-{machine}.run"
    kernels = "Atlas-A3-cann-kernels" if name == "A3" else f"Ascend-cann-kernels-{name}"
    by_machine = cann_order(cann) >= cann_order(_KERNELS_BY_MACHINE)
    return f"{kernels}_{cann}_linux{f'-{machine}' if by_machine else '*'}.run"


def _is_split(cann: str) -> bool:
    return cann_order(cann) >= cann_order(_SPLIT_OPS)


def _python(found: Solution) -> Step:
    python = found.python[0]
    needs = [record["package"] for record in records("cann_packages")]
    numpy = "numpy" if (release(found.torch) or (0, 0, 0)) >= _NUMPY_2 else "'numpy<2'"
    return Step(
        say("A Python {python} of its own", "独立的 Python {python} 环境", python=python),
        (
            f"python{python} -m venv ascend-venv && source ascend-venv/bin/activate",
            "pip install " + " ".join(numpy if name == "numpy" else name for name in needs),
        ),
        say("the packages are those that CANN's own compiler imports", "这些软件包是 CANN 算子编译器需要的"),
    )


def _torch(found: Solution, row: TorchNpuRow) -> Step:
    vision = (f"'torchvision=={found.torchvision}.*'",) if found.torchvision else ()
    machines = (found.machine,) if found.machine else ("x86_64", "aarch64")
    lines = [_torch_line(row, machine, found.python[0], *vision) for machine in machines]
    if len(set(lines)) > 1:
        lines = [f"{line}   # {machine}" for line, machine in zip(lines, machines)]
    old = torch_requirement(row, "x86_64").endswith("+cpu")
    return Step(
        say(
            "torch {torch} and torch_npu {build}",
            "torch {torch} 与 torch_npu {build}",
            torch=row.torch,
            build=row.torch_npu,
        ),
        tuple(dict.fromkeys(lines)),
        say(
            "on x86_64 this torch_npu asks for torch with the label +cpu, which only PyTorch's own index has",
            "在 x86_64 上，该 torch_npu 依赖带 +cpu 标签的 torch，只有 PyTorch 官方索引提供",
        )
        if old and found.machine != "aarch64"
        else "",
    )


def _torch_line(row: TorchNpuRow, machine: str, python: str, *also: str) -> str:
    if python in row.python_wheels:
        return pip_install(row, machine, *also)
    tag, torch = "cp" + python.replace(".", ""), torch_requirement(row, machine)
    index = f" --extra-index-url {CPU_INDEX}" if torch.endswith("+cpu") else ""
    return (
        f"pip install {torch} ./torch_npu-{row.torch_npu}-{tag}-{tag}-*_{machine}.whl {' '.join(also)}".rstrip() + index
    )


def _nnal(found: Solution) -> Iterator[Step]:
    machine = found.machine or "$(uname -m)"
    yield Step(
        say("NNAL {version}", "NNAL {version}", version=found.cann),
        (f"bash ./Ascend-cann-nnal_{found.cann}_linux-{machine}.run --install",),
        say(
            "only now: it is installed with the toolkit's environment sourced",
            "此时才能安装：需要先 source toolkit 的环境变量",
        ),
    )
    yield Step(
        say("NNAL's environment, in every new shell, last", "NNAL 环境变量，每个新 shell 都需要，放在最后"),
        (f"source {ASCEND}/nnal/atb/set_env.sh",),
        say(
            "it asks the torch of the active Python which C++ ABI it has, and guesses where there is none; "
            "guessed wrong, libatb.so is not found or has no such symbol, weeks later",
            "它会询问当前 Python 中 torch 的 C++ ABI，没有 torch 时只能猜测；"
            "猜错时，日后会报找不到 libatb.so 或符号未定义",
        ),
    )


def _stacks(found: Solution) -> Iterator[Step]:
    if "mindspeed_mm" in found.fixed:
        yield Step(
            say(
                "MindSpeed-MM {mm}, with its MindSpeed and Megatron-LM",
                "MindSpeed-MM {mm} 及其 MindSpeed、Megatron-LM",
                mm=found.mindspeed_mm,
            ),
            (
                f"git -C MindSpeed checkout {found.mindspeed} && pip install -e MindSpeed",
                f"git -C Megatron-LM checkout core_v{found.megatron_core} && cp -r Megatron-LM/megatron MindSpeed-MM/",
                "pip install -e MindSpeed-MM",
            ),
        )
    pins = mindie_sd_pins(found.mindie_sd) if "mindie_sd" in found.fixed else ()
    if pins:
        title = say("What MindIE-SD {version} pins", "MindIE-SD {version} 固定的版本", version=found.mindie_sd)
        yield Step(title, ("pip install " + " ".join(pins),))


def mindie_sd_pins(version: str) -> tuple[str, ...]:
    """The requirements that a MindIE-SD pins, without torch and torchvision."""
    names = ("diffusers", "transformers", "accelerate", "numpy", "av")
    rows = [record for record in records("mindie_sd") if record["mindie_sd"] == version]
    return tuple(f"{name}=={record[name]}" for record in rows for name in names if record[name])
