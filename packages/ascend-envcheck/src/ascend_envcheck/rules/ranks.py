"""Rules on the processes of a job, and on the container that they run in."""

from __future__ import annotations

from typing import Iterable, Sequence

from ascend_envcheck.findings import EVERY_DEVICE, NPU, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.probes.network import ASCEND, MOUNT_POINTS, MOUNTS, RANK_TABLE
from ascend_envcheck.rank_table import RankTable, read
from ascend_envcheck.rules.environment import Environment
from ascend_envcheck.rules.network import device_addresses
from ascend_envcheck.rules.rule import NO_NPU, NOT_LIVE, Rule, npu_count
from ascend_envcheck.rules.variable_conflicts import NOT_SET
from ascend_envcheck.snapshot import Snapshot
from ascend_envcheck.variables import whole_number

FAIL, WARN, INFO, SKIP = Severity.FAIL, Severity.WARN, Severity.INFO, Severity.SKIP

_NPU = (NPU,)
_SHOWN = 200  # characters of a value
_WITHOUT_HCCS = ("ascend910", "ascend310p")
"""SoCs whose rank table has a device_ip for every device, even on one server; HCCL user guide, rank table."""

_TORCHRUN = "https://docs.pytorch.org/docs/stable/elastic/run.html (environment variables)"


def rank_table(snapshot: Snapshot) -> Iterable[Finding]:
    """NET-RANKTABLE: the rank table is sound, and speaks of this machine."""
    env = Environment(snapshot)
    path, text = env["RANK_TABLE_FILE"], snapshot.files.get(RANK_TABLE)
    if not path or (text is None and path in snapshot.paths):
        yield Finding("NET-RANKTABLE", SKIP, _NOT_READ if path else _NO_TABLE, doubts=_NPU if path else ())
        return
    table = read(text or "", with_addresses=_needs_addresses(env))
    absent = say("{path} does not exist", "{path} 不存在", path=path[:_SHOWN])
    faults = [absent] if text is None else [*table.faults, *_strangers(snapshot, table), *_miscounted(env, table)]
    faults += [*_link(snapshot, path), *_beside(env)]
    if faults:
        cause = say("RANK_TABLE_FILE: {faults}", "RANK_TABLE_FILE：{faults}", faults=joined(faults))
        source = "HCCL user guide, rank table; errors EI0004, EI0014, EI0017"
        yield Finding("NET-RANKTABLE", FAIL, cause, 'python3 -m json.tool "$RANK_TABLE_FILE"', source, blocks=_NPU)
    else:
        template = ("the rank table has {count} ranks, and is sound", "rank table 共 {count} 个 rank，格式正确")
        yield Finding("NET-RANKTABLE", INFO, say(*template, count=len(table.devices)))


_NO_TABLE = say("RANK_TABLE_FILE is not set; the launcher tells the ranks", "未设置 RANK_TABLE_FILE，由启动器分配 rank")
_NOT_READ = say(
    "the rank table was not read: it is larger than 64 KiB, or this user may not read it",
    "未读取 rank table：文件超过 64 KiB，或当前用户无读取权限",
)


def _needs_addresses(env: Environment) -> bool:
    """Whether even one server needs device_ip: it has no HCCS, or is told not to use it."""
    return env.soc in _WITHOUT_HCCS or env["HCCL_INTER_HCCS_DISABLE"] == "TRUE"


def _beside(env: Environment) -> Iterable[Message]:
    chiefs = ", ".join(sorted(name for name in env.set if name.startswith("CM_")))
    if chiefs:
        yield say("{names} must not be set as well", "不能同时设置 {names}", names=chiefs[:_SHOWN])


def _miscounted(env: Environment, table: RankTable) -> Iterable[Message]:
    world = whole_number(env["WORLD_SIZE"])
    if world is not None and world != len(table.devices):
        template = ("it has {count} ranks, WORLD_SIZE is {world}", "其中有 {count} 个 rank，而 WORLD_SIZE 为 {world}")
        yield say(*template, count=len(table.devices), world=world)


def _link(snapshot: Snapshot, path: str) -> list[Message]:
    folder, _, name = path.rpartition("/")
    target = snapshot.paths.get(path)
    if target is None or target == f"{snapshot.paths.get(folder, folder)}/{name}":
        return []
    return [say("it is a symbolic link, which HCCL refuses", "该文件是软链接，HCCL 不接受")]


def _strangers(snapshot: Snapshot, table: RankTable) -> list[Message]:
    """What does not fit this machine, where its NPUs have told their addresses."""
    mine = set(device_addresses(snapshot).values())
    servers = {device.server for device in table.devices if device.address in mine}
    if mine and any(device.address for device in table.devices) and not servers:
        return [say("no NPU of this machine is in it", "其中没有本机的 NPU")]
    if len(table.servers) == 1:
        servers = set(table.servers)
    ids = [device.device_id for device in table.devices if device.server in servers and device.device_id is not None]
    count = npu_count(snapshot)
    if ids and count and max(ids) >= count:
        return [
            say(
                "device_id {id}, and this machine has {count} NPU(s)",
                "device_id 为 {id}，而本机只有 {count} 个 NPU",
                id=max(ids),
                count=count,
            )
        ]
    return []


def sizes(snapshot: Snapshot) -> Iterable[Finding]:
    """DIST-SIZE: ranks, machines and visible NPUs go together."""
    env = Environment(snapshot)
    names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    given = {name: env.set[name] for name in names if name in env.set}
    if not given:
        yield Finding("DIST-SIZE", SKIP, NOT_SET)
        return
    wrong = [f"{name}={value[:32]}" for name, value in given.items() if whole_number(value) is None]
    fault = say("{names}: no number", "{names}：不是数字", names=", ".join(wrong)) if wrong else _size_fault(env)
    if fault:
        command = "unset WORLD_SIZE RANK LOCAL_WORLD_SIZE LOCAL_RANK   # torchrun sets them for its processes"
        yield Finding("DIST-SIZE", FAIL, fault, command, _TORCHRUN, blocks=EVERY_DEVICE)
        return
    short = _too_few_npus(snapshot, env)
    if short:
        yield Finding(
            "DIST-SIZE",
            FAIL,
            short,
            "torchrun --nproc_per_node=$(ls /dev/davinci[0-9]* | wc -l) SCRIPT",
            _TORCHRUN,
            _NPU,
        )
        return
    told = joined([f"{name}={value}" for name, value in given.items()], ", ", "、")
    if _uneven(env):
        cause = say(
            "{told} on {machines} machine(s): the machines have different numbers of ranks",
            "{told}，共 {machines} 台机器：各机器的 rank 数不同",
            told=told,
            machines=env.machines(),
        )
        yield Finding("DIST-SIZE", WARN, cause, "env | grep -E 'WORLD_SIZE|RANK|NNODES'", _TORCHRUN)
    else:
        yield Finding("DIST-SIZE", INFO, told)


def _uneven(env: Environment) -> bool:
    world, local, machines = whole_number(env["WORLD_SIZE"]), whole_number(env["LOCAL_WORLD_SIZE"]), env.machines()
    return None not in (world, local, machines) and world != (local or 0) * (machines or 0)


def _size_fault(env: Environment) -> Message | None:
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        low, high = whole_number(env[rank]), whole_number(env[size])
        too_large = low is not None and high is not None and (low > high if rank.endswith("SIZE") else low >= high)
        if too_large or high == 0:
            words = {"rank": rank, "low": env[rank] or "?", "size": size, "high": env[size]}
            return say("{rank}={low} does not go with {size}={high}", "{rank}={low} 与 {size}={high} 矛盾", **words)
    return None


def _too_few_npus(snapshot: Snapshot, env: Environment) -> Message | None:
    asked = env.set.get("ASCEND_RT_VISIBLE_DEVICES", "")
    visible = min(npu_count(snapshot), len(asked.split(",")) if asked else npu_count(snapshot))
    needed = max(whole_number(env["LOCAL_WORLD_SIZE"]) or 0, (whole_number(env["LOCAL_RANK"]) or 0) + 1)
    if visible == 0 or needed <= visible:
        return None
    return say(
        "{needed} ranks on this machine, and {visible} visible NPU(s): each rank needs its own",
        "本机有 {needed} 个 rank，但仅 {visible} 个可见 NPU：每个 rank 需独占一个",
        needed=needed,
        visible=visible,
    )


def mounts(snapshot: Snapshot) -> Iterable[Finding]:
    """CONTAINER-MOUNTS: the container was given what the driver needs besides the devices."""
    if not snapshot.host.live and not snapshot.host.container:
        yield Finding("CONTAINER-MOUNTS", SKIP, NOT_LIVE)
        return
    if not snapshot.host.container or npu_count(snapshot) == 0:
        outside = say("this is no container", "不在容器内")
        yield Finding("CONTAINER-MOUNTS", SKIP, NO_NPU if snapshot.host.container else outside)
        return
    missing = [path for path in MOUNTS if path not in snapshot.paths]
    whole = ASCEND in snapshot.folders.get(MOUNT_POINTS, ())
    if whole:
        cause = say(
            "all of /usr/local/Ascend is mounted over the image, whose CANN is hidden by that of the host",
            "整个 /usr/local/Ascend 被挂载覆盖镜像，镜像内的 CANN 被宿主机的遮盖",
        )
        yield Finding("CONTAINER-MOUNTS", WARN, cause, _run_with(MOUNTS[:4]), _IMAGES, doubts=_NPU)
    if missing:
        needed = [path for path in missing if path in MOUNTS[:3]]
        cause = say("the container lacks {paths}", "容器缺少挂载 {paths}", paths=", ".join(missing))
        yield Finding("CONTAINER-MOUNTS", WARN if needed else INFO, cause, _run_with(missing), _IMAGES)
    if not whole and not missing:
        cause = say("the container has the driver's files", "容器已挂载驱动相关文件")
        yield Finding("CONTAINER-MOUNTS", INFO, cause)


_IMAGES = "MindSpeed-MM and MindIE images, docker run; Ascend/mind-cluster docs, ascend-docker-runtime mounts"


def _run_with(paths: Sequence[str]) -> str:
    return " ".join(["docker run", *(f"-v {path}:{path}" for path in paths), "…"])


RULES = (
    Rule("NET-RANKTABLE", say("the rank table is sound", "rank table 正确"), rank_table, "network", _NPU),
    Rule(
        "DIST-SIZE",
        say("ranks, machines and NPUs go together", "rank、机器与 NPU 数量相符"),
        sizes,
        "network",
        EVERY_DEVICE,
    ),
    Rule("CONTAINER-MOUNTS", say("the container has what the driver needs", "容器挂载完整"), mounts, "network"),
)
