"""Rules on the machine around the interpreter: processor, system, kernel, clock.

They matter only where there is an NPU: without one they are skipped, and a laptop hears of none.
"""

from __future__ import annotations

import re
from typing import Iterable, Mapping

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.messages import Message, say
from ascend_envcheck.rules.rule import NO_NPU, NOT_LIVE, Rule, npu_count
from ascend_envcheck.snapshot import OK, Snapshot
from ascend_envcheck.tables import records
from ascend_envcheck.versions import release, series

MACHINES = ("x86_64", "aarch64")
"""What torch_npu and CANN are built for."""
OLDEST_KERNEL = (5, 10, 0)
"""CANN recommends it; accelerate warns below 5.5."""
SKEW_SECONDS = 1.0
"""Beyond it the lines of several nodes' logs can't be put in order."""
HCCL_CONNECT_SECONDS = 120
"""How long HCCL waits for its peers when HCCL_CONNECT_TIMEOUT does not say."""

UNKNOWN = say("not to be seen", "无法得知")
_NPU = (NPU,)


def skip(rule: str, cause: Message) -> Finding:
    """A finding that says why nothing can be said."""
    return Finding(rule, Severity.SKIP, cause)


def unseen_host(rule: str, snapshot: Snapshot, seen: object) -> Finding | None:
    """Why a rule on the host of an NPU can't be judged, None when it can."""
    if npu_count(snapshot) == 0:
        return skip(rule, NO_NPU)
    if not snapshot.host.live and not seen:
        return skip(rule, NOT_LIVE)
    return None if seen else skip(rule, UNKNOWN)


def machine(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-ARCH: a processor that torch_npu is built for."""
    given = snapshot.python.machine
    if not given:
        yield skip("HOST-ARCH", UNKNOWN)
    elif given in MACHINES or npu_count(snapshot) == 0:
        cause = say("the processor is {given}", "处理器架构为 {given}", given=given)
        if given == "x86_64" and npu_count(snapshot):
            cause = say(
                "{cause}; the vendor's images of MindSpeed-MM are for aarch64 only",
                "{cause}；厂商的 MindSpeed-MM 镜像仅支持 aarch64",
                cause=cause,
            )
        yield Finding("HOST-ARCH", Severity.INFO, cause)
    else:
        cause = say(
            "torch_npu has wheels for x86_64 and aarch64, none for {given}",
            "torch_npu 只提供 x86_64 与 aarch64 的安装包，没有 {given} 的",
            given=given,
        )
        source = "torch_npu wheels on PyPI"
        yield Finding("HOST-ARCH", Severity.FAIL, cause, command="uname -m", source=source, blocks=_NPU)


def system(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-OS: which operating system it is."""
    name = snapshot.host.os_name
    if name:
        yield Finding("HOST-OS", Severity.INFO, say("the system is {name}", "操作系统为 {name}", name=name))
    else:
        yield skip("HOST-OS", say("/etc/os-release does not tell", "/etc/os-release 中没有说明"))


def libc(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-GLIBC: new enough for the wheels of torch_npu."""
    given, given_release = snapshot.host.libc, release(snapshot.host.libc.rpartition(" ")[2])
    installed = snapshot.distributions.get("torch_npu")
    need = _glibc(series(installed.version) if installed else None, snapshot.python.machine)
    unseen = unseen_host("HOST-GLIBC", snapshot, given)
    if unseen is not None:
        yield unseen
    elif given_release is None and given != "musl":
        yield skip("HOST-GLIBC", say("no version to read in {given}", "无法读出 {given} 的版本", given=given))
    elif installed is None or need is None:
        yield Finding("HOST-GLIBC", Severity.INFO, say("the C library is {given}", "C 库为 {given}", given=given))
    elif given_release is not None and given_release >= (release(need["glibc"]) or (0, 0, 0)):
        cause = say("{given} is new enough ({need})", "{given} 满足要求（{need}）", given=given, need=need["glibc"])
        yield Finding("HOST-GLIBC", Severity.INFO, cause)
    elif snapshot.imports.torch_npu == OK:
        cause = say("{given} is old, yet torch_npu imports", "{given} 较旧，但 torch_npu 可以导入", given=given)
        yield Finding("HOST-GLIBC", Severity.INFO, cause)
    else:
        yield Finding(
            "HOST-GLIBC",
            Severity.FAIL,
            say(
                "the C library is {given}, the wheels of torch_npu {version} need glibc {need}",
                "C 库为 {given}，torch_npu {version} 的安装包需要 glibc {need}",
                given=given,
                version=installed.version,
                need=need["glibc"],
            ),
            command="ldd --version | head -1   # a container of Ubuntu 22.04 or openEuler 22.03 has a newer one",
            source=f"{need['source']} ({need['confidence']})",
            blocks=_NPU,
        )


def _glibc(torch_npu: str | None, machine_name: str) -> Mapping[str, str] | None:
    """The row of the newest series that is not newer than this one."""
    given = release(torch_npu or "")
    rows = [row for row in records("glibc") if row["machine"] == machine_name]
    older = [row for row in rows if given and (release(row["torch_npu_series"]) or given) <= given]
    return older[-1] if older else None


def kernel(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-KERNEL: not older than CANN recommends."""
    given = snapshot.host.kernel
    unseen = unseen_host("HOST-KERNEL", snapshot, release(given))
    if unseen is not None:
        yield unseen
    elif (release(given) or OLDEST_KERNEL) >= OLDEST_KERNEL:
        yield Finding("HOST-KERNEL", Severity.INFO, say("the kernel is {given}", "内核为 {given}", given=given))
    else:
        cause = say(
            "the kernel is {given}; CANN recommends 5.10, and accelerate warns of hangs below 5.5",
            "内核为 {given}；CANN 建议 5.10 及以上，低于 5.5 时 accelerate 会警告可能挂起",
            given=given,
        )
        source = "CANN installation guide; accelerate's check of the kernel"
        yield Finding("HOST-KERNEL", Severity.WARN, cause, command="uname -r", source=source)


def processor(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-CPU: the processor runs at full speed."""
    governor = snapshot.host.governor
    unseen = unseen_host("HOST-CPU", snapshot, governor)
    if unseen is not None:
        yield unseen
    elif governor == "performance":
        yield Finding("HOST-CPU", Severity.INFO, say("the processor runs at full speed", "处理器以最高频率运行"))
    else:
        cause = say(
            "the frequency governor is {governor}; performance starts kernels sooner",
            "CPU 调频策略为 {governor}；performance 可加快算子下发",
            governor=governor,
        )
        yield Finding("HOST-CPU", Severity.INFO, cause, command="sudo cpupower frequency-set -g performance")


def clock(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-CLOCK: the clock is that of the other nodes."""
    skew = re.search(r"system time\s*:\s*([\d.]{1,20}) seconds", snapshot.command("chronyc tracking").output, re.I)
    seconds = _seconds(skew[1]) if skew else None
    lines = snapshot.command("timedatectl").output
    synchronized = re.search(r"synchronized:\s*(yes|no)", lines, re.I)
    unseen = unseen_host("HOST-CLOCK", snapshot, seconds is not None or synchronized)
    if unseen is not None:
        if unseen.cause is UNKNOWN:
            unseen = skip("HOST-CLOCK", say("neither chronyc nor timedatectl tells", "chronyc 与 timedatectl 均未说明"))
        yield unseen
    elif seconds is not None:
        yield _skewed(seconds, snapshot.variables.get("HCCL_CONNECT_TIMEOUT", ""))
    elif synchronized and synchronized[1].lower() == "yes":
        yield Finding("HOST-CLOCK", Severity.INFO, say("the clock is synchronized", "系统时钟已同步"))
    else:
        cause = say(
            "the clock is not synchronized: logs of several nodes can't be put in order",
            "系统时钟未同步：多节点日志无法对齐",
        )
        yield Finding("HOST-CLOCK", Severity.INFO, cause, command="sudo systemctl enable --now chronyd")


def _skewed(seconds: float, timeout: str) -> Finding:
    limit = int(timeout) if re.fullmatch(r"[0-9]{1,5}", timeout.strip()) else HCCL_CONNECT_SECONDS
    cause = say("the clock is {seconds:g} s off its server", "系统时钟与时间服务器相差 {seconds:g} 秒", seconds=seconds)
    if seconds > limit / 2:
        source = "HCCL environment variables: HCCL_CONNECT_TIMEOUT"
        return Finding("HOST-CLOCK", Severity.WARN, cause, command="sudo chronyc makestep", source=source)
    command = "sudo chronyc makestep" if seconds > SKEW_SECONDS else ""
    return Finding("HOST-CLOCK", Severity.INFO, cause, command=command)


def _seconds(number: str) -> float | None:
    try:
        return float(number)
    except ValueError:
        return None


def container(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-CONTAINER: whether this is one."""
    kind = snapshot.host.container
    if kind:
        yield Finding(
            "HOST-CONTAINER", Severity.INFO, say("inside a container ({kind})", "在容器中（{kind}）", kind=kind)
        )
    elif snapshot.host.live:
        yield Finding("HOST-CONTAINER", Severity.INFO, say("not in a container", "不在容器中"))
    else:
        yield skip("HOST-CONTAINER", NOT_LIVE)


RULES = (
    Rule(
        "HOST-ARCH", say("torch_npu is built for this processor", "torch_npu 支持该处理器架构"), machine, "host", _NPU
    ),
    Rule("HOST-OS", say("the operating system is known", "操作系统已知"), system, "host"),
    Rule("HOST-GLIBC", say("glibc is new enough for torch_npu", "glibc 满足 torch_npu 的要求"), libc, "host", _NPU),
    Rule("HOST-KERNEL", say("the kernel is 5.10 or newer", "内核不低于 5.10"), kernel, "host"),
    Rule("HOST-CPU", say("the processor runs at full speed", "处理器以最高频率运行"), processor, "host"),
    Rule("HOST-CLOCK", say("the clock is synchronized", "系统时钟已同步"), clock, "host"),
    Rule("HOST-CONTAINER", say("whether this is a container", "是否在容器中"), container, "host"),
)
