"""Rules on torch and what must be of its release: torch_npu, CANN beneath it, torchvision, torchaudio."""

from __future__ import annotations

from typing import Iterable

from ascend_envcheck.findings import EVERY_DEVICE, NPU, Finding, Severity
from ascend_envcheck.messages import Message, say
from ascend_envcheck.rules.cann import NO_CANN, active_version
from ascend_envcheck.rules.rule import Rule, npu_count
from ascend_envcheck.snapshot import OK, Snapshot
from ascend_envcheck.tables import (
    CPU_INDEX,
    DATA_DATE,
    TorchNpuRow,
    builds_for,
    cross_pairing,
    find_torch_npu,
    known_canns,
    pairings,
    pip_install,
    records,
)
from ascend_envcheck.versions import cann_version, pin_allows, release, series, torch_pin

TABLE = f"TorchNPU compatibility table, read {DATA_DATE}"

_NEW_ABI_SINCE = (2, 7, 0)
"""From here on every torch and torch_npu wheel is built for glibc 2.28 with the new C++ ABI (PyPI, wheel tags)."""


_STABLE_TORCHAUDIO = (2, 11, 0)
"""From here on torchaudio runs on its own torch and on later ones (docs.pytorch.org/audio, installation)."""


_COMPANION_SOURCES = {
    "torchvision": "pytorch/vision README compatibility table (official)",
    "torchaudio": "https://docs.pytorch.org/audio, installation, compatibility matrix (official)",
}


def version_of(snapshot: Snapshot, name: str) -> str | None:
    """The installed version of a distribution, None when it is not installed."""
    found = snapshot.distributions.get(name)
    return found.version if found else None


def not_installed(name: str) -> Message:
    """That a distribution is not installed."""
    return say("{name} is not installed", "未安装 {name}", name=name)


def torch_npu_pair(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCH-NPU: torch and torch_npu are of one release, and no CUDA device competes."""
    torch, torch_npu = version_of(snapshot, "torch"), version_of(snapshot, "torch_npu")
    if torch is None or torch_npu is None:
        yield Finding("TORCH-NPU", Severity.SKIP, not_installed("torch_npu" if torch_npu is None else "torch"))
        return
    row = find_torch_npu(torch_npu)
    values = {"torch": torch, "torch_npu": torch_npu}
    if release(torch) is None or release(torch_npu) is None:
        cause = say(
            "no release to read in torch {torch!r} and torch_npu {torch_npu!r}",
            "无法从 torch {torch!r} 与 torch_npu {torch_npu!r} 中读出版本",
            **values,
        )
        yield Finding("TORCH-NPU", Severity.SKIP, cause, doubts=(NPU,))
    elif release(torch) != release(torch_npu):
        yield _mismatch(snapshot, torch, torch_npu)
    elif snapshot.imports.device == "cuda" and npu_count(snapshot):
        cause = say(
            "torch shows a CUDA device beside an NPU; torch takes one kind of accelerator at a time",
            "torch 同时看到 CUDA 设备与 NPU；torch 一次只能使用一种加速器",
        )
        command = "export CUDA_VISIBLE_DEVICES=   # or install the torch without CUDA"
        yield Finding("TORCH-NPU", Severity.WARN, cause, command=command, source=TABLE, doubts=(NPU,))
    elif row is None:
        cause = say(
            "torch_npu {version} is unknown to this tool, not in its table of {date}; it may well be newer",
            "本工具不认识 torch_npu {version}（数据表日期 {date}），可能是更新的版本",
            version=torch_npu,
            date=DATA_DATE,
        )
        yield Finding("TORCH-NPU", Severity.WARN, cause, source=TABLE, doubts=(NPU,))
    else:
        status = "" if row.status in ("general", "patch") else f", {row.status} build"
        train = f" (TorchNPU {row.release}{status})" if row.release else status
        cause = say(
            "torch {torch} and torch_npu {torch_npu}{train} fit",
            "torch {torch} 与 torch_npu {torch_npu}{train} 匹配",
            train=train,
            **values,
        )
        yield Finding("TORCH-NPU", Severity.INFO, cause, source=row.note)


def _mismatch(snapshot: Snapshot, torch: str, torch_npu: str) -> Finding:
    build = build_for(torch, active_version(snapshot)) or find_torch_npu(torch_npu)
    return Finding(
        "TORCH-NPU",
        Severity.FAIL,
        say(
            "torch {torch} and torch_npu {torch_npu} are of different releases; each torch_npu runs on one torch",
            "torch {torch} 与 torch_npu {torch_npu} 版本不同；每个 torch_npu 只能配一个 torch",
            torch=torch,
            torch_npu=torch_npu,
        ),
        command=pip_install(build, snapshot.python.machine)
        if build
        else f"pip index versions torch_npu   # none is known for {torch!r}",
        source=build.note if build else TABLE,
        blocks=(NPU,),
    )


def torch_cann(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCH-CANN: torch_npu and CANN are of one train, or of series that the vendor lets mix."""
    torch_npu, cann = version_of(snapshot, "torch_npu"), active_version(snapshot)
    row = find_torch_npu(torch_npu) if torch_npu else None
    missing = _unjudged(snapshot, torch_npu, cann, row)
    if missing is not None or row is None or cann is None:
        yield missing or Finding("TORCH-CANN", Severity.SKIP, NO_CANN)
        return
    pairing = cross_pairing(row, cann)
    values = {"torch_npu": row.torch_npu, "cann": cann, "made_for": row.cann}
    if cann_version(row.cann) == cann:
        cause = say(
            "torch_npu {torch_npu} was made for CANN {cann}", "torch_npu {torch_npu} 配套的就是 CANN {cann}", **values
        )
        yield Finding("TORCH-CANN", Severity.INFO, cause, source=row.note)
    elif pairing is not None:
        cause = say(
            "torch_npu {torch_npu} was made for CANN {made_for}; TorchNPU {series} runs on {fits} too",
            "torch_npu {torch_npu} 配套 CANN {made_for}；TorchNPU {series} 也支持 {fits}",
            series=pairing.of,
            fits=pairing.fits,
            **values,
        )
        yield Finding("TORCH-CANN", Severity.INFO, cause, source=f"{pairing.source} ({pairing.confidence})")
    else:
        yield _nobody_vouches(snapshot, row, cann)


def _nobody_vouches(snapshot: Snapshot, row: TorchNpuRow, cann: str) -> Finding:
    builds = builds_for(version_of(snapshot, "torch") or row.torch, cann)  # as TORCH-NPU says where these two differ
    if cann in known_canns():
        why = say("nobody vouches for the pair", "没有来源认可这一组合")
    else:
        why = say("a version unknown to this tool", "本工具不认识该版本")
    return Finding(
        "TORCH-CANN",
        Severity.WARN,
        say(
            "torch_npu {torch_npu} was made for CANN {made_for}, here is CANN {cann}: {why}",
            "torch_npu {torch_npu} 配套 CANN {made_for}，而此处是 CANN {cann}：{why}",
            torch_npu=row.torch_npu,
            made_for=row.cann,
            cann=cann,
            why=why,
        ),
        command=pip_install(builds[0], snapshot.python.machine)
        if builds
        else f"./Ascend-cann-toolkit_{row.cann}_*.run --install",
        source=row.note,
        doubts=(NPU,),
    )


def _unjudged(snapshot: Snapshot, torch_npu: str | None, cann: str | None, row: TorchNpuRow | None) -> Finding | None:
    doubts = (NPU,) if npu_count(snapshot) else ()
    if torch_npu is None:
        return Finding("TORCH-CANN", Severity.SKIP, not_installed("torch_npu"))
    if not snapshot.cann_homes:
        return Finding("TORCH-CANN", Severity.SKIP, NO_CANN)
    if cann is None:
        cause = say("the version of CANN can't be read", "无法读取 CANN 版本")
        return Finding("TORCH-CANN", Severity.SKIP, cause, doubts=doubts)
    if row is None or not row.cann:
        cause = say(
            "no source says for which CANN torch_npu {version} was made",
            "没有来源说明 torch_npu {version} 配套哪个 CANN",
            version=torch_npu,
        )
        return Finding("TORCH-CANN", Severity.SKIP, cause, doubts=doubts)
    return None


def abi(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCH-ABI: torch and torch_npu were built with one C++ ABI."""
    torch, torch_npu = version_of(snapshot, "torch"), version_of(snapshot, "torch_npu")
    seen = snapshot.imports
    numbers = [release(torch or ""), release(torch_npu or "")]
    if torch is None or torch_npu is None:
        yield Finding("TORCH-ABI", Severity.SKIP, not_installed("torch_npu" if torch_npu is None else "torch"))
    elif seen.torch_npu == OK:
        abi = "?" if seen.cxx11_abi is None else int(seen.cxx11_abi)
        cause = say(
            "torch_npu loads into torch (C++11 ABI {abi})", "torch_npu 可载入 torch（C++11 ABI {abi}）", abi=abi
        )
        yield Finding("TORCH-ABI", Severity.INFO, cause)
    elif numbers[0] != numbers[1] or None in numbers:
        cause = say("their releases differ, see TORCH-NPU", "二者版本不同，见 TORCH-NPU")
        yield Finding("TORCH-ABI", Severity.SKIP, cause)
    elif "undefined symbol" in seen.torch_npu_detail + seen.torch_detail:
        cause = say(
            "torch and torch_npu are both {version}, and yet a symbol is missing: one of them was built with the other "
            "C++ ABI, or for another build of torch",
            "torch 与 torch_npu 都是 {version}，却缺少符号：其中一个使用了另一种 C++ ABI，或针对另一个 torch 构建",
            version=torch_npu,
        )
        yield _other_abi(snapshot, cause, Severity.FAIL)
    elif seen.cxx11_abi is False and (release(torch) or (0, 0, 0)) >= _NEW_ABI_SINCE:
        cause = say(
            "torch {version} is built with the old C++ ABI; the wheels of torch_npu from 2.7 on have the new one",
            "torch {version} 使用旧 C++ ABI；torch_npu 自 2.7 起的 wheel 使用新 ABI",
            version=torch,
        )
        yield _other_abi(snapshot, cause, Severity.WARN)
    else:
        cause = say("torch_npu was not loaded, and nothing speaks against it", "未加载 torch_npu，未发现异常")
        yield Finding("TORCH-ABI", Severity.SKIP, cause)


def _other_abi(snapshot: Snapshot, cause: Message, severity: Severity) -> Finding:
    row = build_for(version_of(snapshot, "torch"), active_version(snapshot))
    again = "--force-reinstall"
    command = pip_install(row, snapshot.python.machine, again) if row else f"pip install {again} torch_npu"
    blocks = (NPU,) if severity is Severity.FAIL else ()
    source = "torch_npu wheels on PyPI: manylinux_2_28 is the new C++ ABI"
    return Finding("TORCH-ABI", severity, cause, command=command, source=source, blocks=blocks, doubts=(NPU,))


def end_of_life(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCH-EOL: the vendor still maintains torch_npu for this torch."""
    torch_npu = version_of(snapshot, "torch_npu")
    found = release(torch_npu or "")
    row = next((row for row in records("lifecycle") if found and release(row["torch"]) == found), None)
    if torch_npu is None or row is None:
        why = not_installed("torch_npu") if torch_npu is None else say("no date is known", "没有已知的日期")
        yield Finding("TORCH-EOL", Severity.SKIP, why)
        return
    source = f"{row['source']} ({row['confidence']})"
    values = {"torch": row["torch"], "end": row["end"]}
    if row["phase"] == "eol":
        cause = say(
            "torch_npu for torch {torch} is no longer maintained, since {end}",
            "面向 torch {torch} 的 torch_npu 已于 {end} 停止维护",
            **values,
        )
        yield Finding("TORCH-EOL", Severity.WARN, cause, command="ascend-envcheck matrix --solve", source=source)
    elif row["end"]:
        cause = say(
            "torch_npu for torch {torch} is maintained until {end}",
            "面向 torch {torch} 的 torch_npu 维护至 {end}",
            **values,
        )
        yield Finding("TORCH-EOL", Severity.INFO, cause, source=source)
    else:
        cause = say("torch_npu for torch {torch} is maintained", "面向 torch {torch} 的 torch_npu 处于维护期", **values)
        yield Finding("TORCH-EOL", Severity.INFO, cause, source=source)


def companions(snapshot: Snapshot) -> Iterable[Finding]:
    """TORCHVISION: installed torchvision and torchaudio were built for this torch; transformers imports them."""
    torch = version_of(snapshot, "torch")
    present = [name for name in ("torchvision", "torchaudio") if name in snapshot.distributions]
    if torch is None or not present:
        yield Finding("TORCHVISION", Severity.SKIP, not_installed("torchvision" if torch else "torch"))
        return
    for name in present:
        yield _companion(snapshot, name, torch)


def _companion(snapshot: Snapshot, name: str, torch: str) -> Finding:
    found = snapshot.distributions[name]
    pins = [torch_pin(line) for line in found.requires]
    pin = next((each for each in pins if each), None)
    wanted = _series_for(name, torch)
    values = {"name": name, "version": found.version, "torch": torch}
    if pin is None and wanted is None:
        cause = say(
            "{name} {version} names no torch, and no table tells which {name} goes with torch {torch}",
            "{name} {version} 未声明 torch 版本，也没有数据说明 torch {torch} 配套哪个 {name}",
            **values,
        )
        return Finding("TORCHVISION", Severity.SKIP, cause)
    if pin_allows(pin, torch) if pin else series(found.version) == wanted or _is_stable(name, found.version, torch):
        cause = say("{name} {version} goes with torch {torch}", "{name} {version} 与 torch {torch} 匹配", **values)
        return Finding("TORCHVISION", Severity.INFO, cause)
    install = f"pip install --no-deps '{name}=={wanted}.*'" if wanted else f"pip uninstall -y {name}"
    # transformers imports torchvision for Qwen2.5-VL's images, torchaudio for models of speech only.
    fatal = name == "torchvision"
    return Finding(
        "TORCHVISION",
        Severity.FAIL if fatal else Severity.WARN,
        say(
            "{name} {version} was built for torch {pin}, torch is {torch}: its operators do not load"
            if pin
            else "{name} {version} was built for another torch than {torch}, with which {name} {fits} goes: "
            "its operators do not load",
            "{name} {version} 面向 torch {pin} 构建，而 torch 为 {torch}：其算子无法加载"
            if pin
            else "{name} {version} 面向另一个 torch 构建，torch {torch} 配套的是 {name} {fits}：其算子无法加载",
            pin=pin,
            fits=wanted,
            **values,
        ),
        command=f"{install} --index-url {CPU_INDEX}" if wanted and is_x86_cpu(snapshot, torch) else install,
        source=f"Requires-Dist of {name} {found.version}" if pin else _COMPANION_SOURCES[name],
        blocks=EVERY_DEVICE if fatal else (),
    )


def _series_for(name: str, torch: str) -> str | None:
    """The series of a companion that goes with a torch."""
    if name == "torchvision":
        return next((pair.fits for pair in pairings("torchvision") if pair.of == series(torch)), None)
    newer = (release(torch) or (0, 0, 0)) > _STABLE_TORCHAUDIO
    return series(".".join(map(str, _STABLE_TORCHAUDIO))) if newer else series(torch)


def _is_stable(name: str, version: str, torch: str) -> bool:
    """Whether a torchaudio is one that runs on every later torch."""
    audio, given = release(version), release(torch)
    return name == "torchaudio" and audio is not None and given is not None and _STABLE_TORCHAUDIO <= audio <= given


def build_for(torch: str | None, cann: str | None) -> TorchNpuRow | None:
    """The newest torch_npu on PyPI for this torch, for this CANN too when there is one."""
    builds = builds_for(torch or "", cann) or builds_for(torch or "")
    return builds[0] if builds else None


def is_x86_cpu(snapshot: Snapshot, torch: str) -> bool:
    """Whether a torch is the CPU build of x86-64, which PyPI does not have."""
    return snapshot.python.machine == "x86_64" and torch.endswith("+cpu")


_NPU = (NPU,)

RULES = (
    Rule(
        "TORCHVISION",
        say("torchvision and torchaudio were built for this torch", "torchvision、torchaudio 与 torch 版本匹配"),
        companions,
        "python",
        EVERY_DEVICE,
    ),
    Rule(
        "TORCH-NPU",
        say("torch and torch_npu are of one release", "torch 与 torch_npu 为同一版本"),
        torch_npu_pair,
        "python",
        _NPU,
    ),
    Rule(
        "TORCH-CANN",
        say("torch_npu was made for this CANN", "torch_npu 与 CANN 版本配套"),
        torch_cann,
        "python",
        _NPU,
    ),
    Rule(
        "TORCH-ABI",
        say("torch and torch_npu have one C++ ABI", "torch 与 torch_npu 的 C++ ABI 一致"),
        abi,
        "python",
        needs_import=True,
    ),
    Rule("TORCH-EOL", say("the vendor maintains this torch_npu", "该 torch_npu 仍在维护期"), end_of_life, "python"),
)
