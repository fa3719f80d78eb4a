"""Rules on environment variables: single values, versions that read them, and what the profiles recommend."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from functools import partial
from typing import Collection, Iterable, Sequence

from ascend_envcheck.findings import NPU, TASK_NAMES, TASKS, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.probes.redact import MASKED
from ascend_envcheck.profiles import env_profile
from ascend_envcheck.rules.environment import Environment
from ascend_envcheck.rules.network import chosen_interface, outward, several_machines
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.rules.variable_conflicts import NOT_SET, TOPICS, told_values
from ascend_envcheck.snapshot import ImportFacts, Snapshot
from ascend_envcheck.variables import ERROR, Variable, options_of, variables, whole_number

FAIL, WARN, INFO, SKIP = Severity.FAIL, Severity.WARN, Severity.INFO, Severity.SKIP

_NPU = (NPU,)
_SHOWN = 200  # characters of a value
_FEW = 6  # entries of a list in one line
_TORCHRUN = "https://docs.pytorch.org/docs/stable/elastic/run.html"

_VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_ASD = ("NPU_ASD_ENABLE", "NPU_ASD_CONFIG")
_ROOT_OF_CANN = re.compile(r"(.*?/(?:ascend-toolkit/[^/]+|cann(?:-[^/]+)?))(?:/|$)")


def values(snapshot: Snapshot) -> Iterable[Finding]:
    """ENV-VALUE: each variable that is set has a legal value."""
    env = Environment(snapshot)
    known = [(variable, env.set[name]) for name, variable in env.known.items() if name in env.set]
    illegal = [finding for variable, value in known for finding in _illegal(variable, value)]
    if not known:
        yield Finding("ENV-VALUE", SKIP, NOT_SET)
    elif not illegal:
        cause = say("{count} variable(s) are set, to legal values", "{count} 个变量取值合法", count=len(known))
        yield Finding("ENV-VALUE", INFO, cause)
    yield from illegal


def _illegal(variable: Variable, value: str) -> Iterable[Finding]:
    """What is wrong with a value: an option that is unknown is perhaps a newer one, anything else is wrong."""
    unknown = [name for name in options_of(value) if variable.options and name not in variable.options]
    wrong = variable.wrong_options(value)
    stops = variable.illegal == ERROR
    effect = _STOPS if stops else _IGNORED
    told = {"name": variable.name, "value": repr(value[:_SHOWN]), "legal": variable.legal, "effect": effect}
    command = f"export {variable.name}={variable.default}" if variable.default else f"unset {variable.name}"
    if unknown:
        names = ", ".join(unknown)[:_SHOWN]
        cause = say(
            "{name} has options that are not known: {names}", "{name} 含有未知选项：{names}", names=names, **told
        )
        yield Finding("ENV-VALUE", WARN, cause, command, variable.source, doubts=_NPU, tasks=variable.tasks)
    if wrong or not variable.allows_form(value):
        if wrong:
            told["value"] = ", ".join(wrong)[:_SHOWN]
            template = ("{name}: {value} is not legal; {effect}", "{name}：{value} 不合法；{effect}")
        else:
            template = ("{name}={value} is not legal ({legal}); {effect}", "{name}={value} 不合法（{legal}）；{effect}")
        yield Finding(
            "ENV-VALUE",
            FAIL if stops else WARN,
            say(*template, **told),
            command,
            variable.source,
            blocks=_NPU if stops else (),
            tasks=variable.tasks,
        )


_STOPS = say("the program stops at it", "程序会因此报错退出")
_IGNORED = say("it is ignored, or the default takes its place", "该值会被忽略或替换为默认值")


def lifetimes(rule: str, of: Collection[str], snapshot: Snapshot) -> Iterable[Finding]:
    """The variables that are set are read by the versions that are here; ``of`` names them, or none for all others."""
    env = Environment(snapshot)
    wanted = [name for name in env.known if (name in of if of else name not in _ASD)]
    known = [env.known[name] for name in wanted if name in env.set]
    found = [finding for variable in known for finding in _lifetime(rule, variable, env)]
    if not known:
        yield Finding(rule, SKIP, NOT_SET)
    elif not found:
        cause = say(
            "the versions here read {count} variable(s) that are set",
            "已设置的 {count} 个变量均被当前版本读取",
            count=len(known),
        )
        yield Finding(rule, INFO, cause)
    yield from found


def _lifetime(rule: str, variable: Variable, env: Environment) -> Iterable[Finding]:
    words = {"name": variable.name, "instead": variable.instead}
    early, gone, late = env.older(variable.since), env.reached(variable.removed), env.reached(variable.deprecated)
    bad = INFO if env[variable.name] == variable.default else WARN  # nothing is lost that was wanted
    if early:
        cause = say(
            "{name} has no effect before {versions}",
            "{name} 在 {versions} 之前不生效",
            versions=", ".join(early),
            **words,
        )
        yield Finding(rule, bad, cause, f"unset {variable.name}", variable.source)
    elif gone:
        cause = say(
            "{name} has no effect from {versions} on; {instead} is the name now",
            "自 {versions} 起 {name} 不再生效，应改用 {instead}",
            versions=", ".join(gone),
            **words,
        )
        yield Finding(rule, bad, cause, f"unset {variable.name}", variable.source)
    elif late:
        cause = say(
            "{name} is deprecated from {versions} on; {instead} is the name now",
            "自 {versions} 起 {name} 已弃用，应改用 {instead}",
            versions=", ".join(late),
            **words,
        )
        yield Finding(rule, INFO, cause, source=variable.source)


def recommended(snapshot: Snapshot) -> Iterable[Finding]:
    """ENV-PROFILE: what a profile recommends, and is not set."""
    if npu_count(snapshot) == 0:
        yield Finding("ENV-PROFILE", SKIP, NO_NPU)
        return
    known = variables()
    for task in TASKS:
        missing = [
            f"{entry.name}={entry.value}"
            for entry in env_profile(task, snapshot=snapshot)
            if entry.value and entry.name not in snapshot.variables and entry.value != known[entry.name].default
        ]
        words = {"task": TASK_NAMES[task], "count": len(missing), "names": joined(missing, ", ", "、")}
        if missing:
            cause = say(
                "recommended to {task}, and not set: {names}", "{task} 时建议设置以下 {count} 个变量：{names}", **words
            )
            command = f'eval "$(ascend-envcheck env --profile {task})"'
            yield Finding("ENV-PROFILE", INFO, cause, command, "ascend-envcheck env", tasks=(task,))
        else:
            cause = say("all that is recommended to {task} is set", "{task} 时建议的变量均已设置", **words)
            yield Finding("ENV-PROFILE", INFO, cause, tasks=(task,))


def visible(snapshot: Snapshot) -> Iterable[Finding]:
    """ENV-VISIBLE: the NPUs that are asked for are the ones that are seen."""
    value = snapshot.variables.get(_VISIBLE, "")
    if not value or value == MASKED:
        yield Finding("ENV-VISIBLE", SKIP, NOT_SET)
        return
    entries = value.split(",")
    # torch counts after this variable has been applied.
    count = npu_count(replace(snapshot, imports=ImportFacts()))
    good = _readable(entries, count)
    if good == len(entries):
        yield Finding("ENV-VISIBLE", INFO, Message(f"{_VISIBLE}={value[:_SHOWN]}"))
        return
    cause = say(
        "{name}={value}: {why}; CANN reads up to there, so that {good} NPU(s) are left",
        "{name}={value}：{why}；CANN 只读取到该处，仅剩 {good} 个 NPU",
        name=_VISIBLE,
        value=value[:_SHOWN],
        why=_stop(entries, good, count, bool(snapshot.host.container)),
        good=good,
    )
    ids = sorted({int(entry) for entry in entries if _is_id(entry.strip(), count)})
    right = ",".join(map(str, ids)) or "0"
    source = variables()[_VISIBLE].source
    yield Finding("ENV-VISIBLE", FAIL, cause, f"export {_VISIBLE}={right}", source, blocks=_NPU)


def _is_id(entry: str, count: int) -> bool:
    number = whole_number(entry)
    return number is not None and (count == 0 or number < count)


def _readable(entries: Sequence[str], count: int) -> int:
    """How many entries are read before one that is not: wrong, beyond the last NPU, or not above the one before."""
    last = -1
    for place, entry in enumerate(entries):
        if not _is_id(entry, count) or int(entry) <= last:
            return place
        last = int(entry)
    return len(entries)


def _stop(entries: Sequence[str], good: int, count: int, container: bool) -> Message:
    entry = entries[good]
    if whole_number(entry) is None:
        return say("{entry} is no device id", "{entry} 不是设备 ID", entry=repr(entry[:32]))
    if _is_id(entry, count):
        return say("the ids do not ascend", "设备 ID 未按升序排列")
    last = count - 1
    if container:
        return say(
            "in this container the ids count from 0 to {last}", "容器内的设备 ID 从 0 到 {last} 重新编号", last=last
        )
    return say("there are NPUs 0 to {last} only", "本机只有 NPU 0 到 {last}", last=last)


def threads(snapshot: Snapshot) -> Iterable[Finding]:
    """ENV-OMP: the ranks of a machine do not start more threads than it has cores."""
    env = Environment(snapshot)
    wanted, ranks = env.number("OMP_NUM_THREADS"), whole_number(env["LOCAL_WORLD_SIZE"]) or 1
    launched = env.is_set("TORCHELASTIC_RUN_ID") or env.is_set("LOCAL_WORLD_SIZE")
    if not env.is_set("OMP_NUM_THREADS") and not launched:
        yield Finding("ENV-OMP", SKIP, NOT_SET)
    elif not env.is_set("OMP_NUM_THREADS"):
        cause = say(
            "OMP_NUM_THREADS is not set: torchrun makes it 1, with other launchers each rank starts a thread a core",
            "未设置 OMP_NUM_THREADS：torchrun 会设为 1，其他启动器会让每个 rank 占满所有核",
        )
        yield Finding("ENV-OMP", INFO, cause, "export OMP_NUM_THREADS=8", _TORCHRUN)
    elif snapshot.host.cpus and wanted and wanted * ranks > snapshot.host.cpus:
        words = {"threads": wanted, "ranks": ranks, "cpus": snapshot.host.cpus}
        cause = say(
            "OMP_NUM_THREADS={threads} on {ranks} rank(s) is more than the {cpus} CPU cores",
            "OMP_NUM_THREADS={threads}，{ranks} 个 rank，超过 {cpus} 个 CPU 核",
            **words,
        )
        command = f"export OMP_NUM_THREADS={max(1, snapshot.host.cpus // ranks)}"
        yield Finding("ENV-OMP", WARN, cause, command, variables()["OMP_NUM_THREADS"].source)
    else:
        yield Finding("ENV-OMP", INFO, Message(f"OMP_NUM_THREADS={env['OMP_NUM_THREADS'][:_SHOWN]}"))


def socket(snapshot: Snapshot) -> Iterable[Finding]:
    """ENV-SOCKET: several machines agree on a network."""
    env, ways = Environment(snapshot), outward(snapshot.host.interfaces)
    named = told_values(env, ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME"))
    source = variables()["HCCL_SOCKET_IFNAME"].source
    closed = env["HCCL_WHITELIST_DISABLE"] == "0" and not env.is_set("HCCL_WHITELIST_FILE")
    if closed:
        cause = say(
            "HCCL_WHITELIST_DISABLE=0 needs HCCL_WHITELIST_FILE",
            "HCCL_WHITELIST_DISABLE=0 时须设置 HCCL_WHITELIST_FILE",
        )
        yield Finding("ENV-SOCKET", WARN, cause, "unset HCCL_WHITELIST_DISABLE", source, doubts=_NPU)
    if not named and len(ways) > 1 and several_machines(snapshot):
        cause = say(
            "several machines, and HCCL_SOCKET_IFNAME is not set: HCCL takes {first}, of {names}",
            "多机任务未设置 HCCL_SOCKET_IFNAME：HCCL 会在 {names} 中选用 {first}",
            first=chosen_interface(snapshot.host.interfaces),
            names=", ".join(ways[:_FEW]),
        )
        command = f"ip -br address; export HCCL_SOCKET_IFNAME=={shlex.quote(ways[0])}   # or another that reaches them"
        yield Finding("ENV-SOCKET", WARN, cause, command, source, doubts=_NPU)
    elif named:
        yield Finding("ENV-SOCKET", INFO, joined(named, ", ", "、"))
    elif not closed:
        cause = say("one machine, or one network, needs no choice", "单机或单一网络，无需指定")
        yield Finding("ENV-SOCKET", INFO if several_machines(snapshot) else SKIP, cause)


def library_path(snapshot: Snapshot) -> Iterable[Finding]:
    """ENV-LIBRARY-PATH: the loader's path is that of one CANN, and its folders exist."""
    entries = [entry for entry in snapshot.variables.get("LD_LIBRARY_PATH", "").split(":") if entry]
    roots = list(dict.fromkeys(match[1] for match in map(_ROOT_OF_CANN.match, _real(snapshot, entries)) if match))
    missing = [entry for entry in entries if entry not in snapshot.paths and entry.rstrip("/") not in snapshot.paths]
    source = "CANN installation guide: set_env.sh"
    if not entries:
        yield Finding("ENV-LIBRARY-PATH", SKIP, NOT_SET)
    elif len(roots) > 1:
        cause = say(
            "LD_LIBRARY_PATH has folders of {count} CANN installations: {roots}",
            "LD_LIBRARY_PATH 中混有 {count} 个 CANN 安装的目录：{roots}",
            count=len(roots),
            roots=joined(roots[:_FEW], ", ", "、"),
        )
        command = "echo $LD_LIBRARY_PATH | tr ':' '\\n'   # then, in a new shell, source set_env.sh of one CANN only"
        yield Finding("ENV-LIBRARY-PATH", WARN, cause, command, source, doubts=_NPU)
    elif missing:
        # set_env.sh itself adds folders that not every package fills.
        cause = say(
            "{count} folder(s) of LD_LIBRARY_PATH do not exist: {folders}",
            "LD_LIBRARY_PATH 中有 {count} 个目录不存在：{folders}",
            count=len(missing),
            folders=joined(missing[:_FEW], ", ", "、"),
        )
        yield Finding("ENV-LIBRARY-PATH", INFO, cause)
    else:
        cause = say(
            "the {count} folder(s) of LD_LIBRARY_PATH exist",
            "LD_LIBRARY_PATH 的 {count} 个目录均存在",
            count=len(entries),
        )
        yield Finding("ENV-LIBRARY-PATH", INFO, cause)


def _real(snapshot: Snapshot, entries: Sequence[str]) -> Iterable[str]:
    return (snapshot.paths.get(entry) or snapshot.paths.get(entry.rstrip("/")) or entry for entry in entries)


_BLOCKING = ("ENV-ALLOC", "ENV-ALLOC-NAMES", "ENV-INTRA-LINK", "ENV-INF-NAN")  # topics that can

RULES = (
    Rule("ENV-VALUE", say("each variable has a legal value", "各变量取值合法"), values, "variables", _NPU),
    Rule(
        "ENV-DEPRECATED",
        say("the variables are read by the versions that are here", "各变量均被当前版本读取"),
        partial(lifetimes, "ENV-DEPRECATED", ()),
        "variables",
    ),
    *(Rule(topic.id, topic.title, topic.judge, "variables", _NPU if topic.id in _BLOCKING else ()) for topic in TOPICS),
    Rule(
        "ENV-ASD",
        say("silent data errors are looked for by the name that is read", "静默故障检测使用了当前版本的变量名"),
        partial(lifetimes, "ENV-ASD", _ASD),
        "variables",
    ),
    Rule("ENV-VISIBLE", say("the NPUs asked for are seen", "指定的 NPU 均可见"), visible, "variables", _NPU),
    Rule("ENV-OMP", say("ranks share the CPU cores", "各 rank 合理分享 CPU 核"), threads, "variables"),
    Rule("ENV-SOCKET", say("several machines agree on a network", "多机使用同一网络"), socket, "variables"),
    Rule(
        "ENV-LIBRARY-PATH",
        say("the loader's path is that of one CANN", "动态库路径只含一个 CANN"),
        library_path,
        "variables",
    ),
    Rule("ENV-PROFILE", say("what the profile recommends is set", "已设置所建议的变量"), recommended, "variables"),
)
