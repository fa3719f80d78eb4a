"""Variables that do not go together: when that is so, by topic; ``data/conflicts.ini`` has what is said of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Iterable, Mapping, Sequence

from ascend_envcheck.findings import NPU, TASKS, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.rules.environment import A2, A3, Environment
from ascend_envcheck.snapshot import Snapshot
from ascend_envcheck.variables import Option, sections

NOT_SET = say("none of the variables that it reads is set", "所检查的变量均未设置")

ALLOC = "PYTORCH_NPU_ALLOC_CONF"
_READS_ALLOC_CONF = {"torch_npu": "26.2.0", "torch": "2.10.0"}
"""The first versions in which TorchNPU reads PYTORCH_ALLOC_CONF; Ascend/pytorch docs, PYTORCH_NPU_ALLOC_CONF."""

_AIV_LONGEST = 1091
"""Seconds that HCCL_EXEC_TIMEOUT may be at most with AIV; cann/hccl docs, HCCL_EXEC_TIMEOUT."""

_SHOWN = 200  # characters of a value

When = Callable[[Environment], bool]


@dataclass(frozen=True)
class Topic:
    """The conflicts of a few variables.

    Args:
        id: of the rule.
        title: what is in order when there is no conflict.
        reads: the variables; with none of them set there is nothing to judge.
        source: where the conflicts are documented.
        conflicts: section ``id.NAME`` of the table of texts, to whether it is so.
        more: findings that no table tells.
    """

    id: str
    title: Message
    reads: tuple[str, ...]
    source: str
    conflicts: Mapping[str, When] = field(default_factory=dict)
    more: Callable[[Environment], Iterable[Finding]] = lambda env: ()

    def judge(self, snapshot: Snapshot) -> Iterable[Finding]:
        """Each conflict that is there; one line when there is none."""
        env = Environment(snapshot)
        if not any(name in env.set for name in self.reads):
            return [Finding(self.id, Severity.SKIP, NOT_SET)]
        found = [self._finding(name, env) for name, when in self.conflicts.items() if when(env)]
        found += self.more(env)
        return found or [Finding(self.id, Severity.INFO, joined(told_values(env, self.reads), ", ", "、"))]

    def _finding(self, name: str, env: Environment) -> Finding:
        text = sections("conflicts")[f"{self.id}.{name}"]
        values = {variable: env[variable][:_SHOWN] for variable in env.known}
        return Finding(
            self.id,
            Severity(text["severity"]),
            say(text["cause"], text["cause.zh"], **values),
            command=text.get("command", ""),
            source=self.source,
            blocks=tuple(text.get("blocks", "").split()),
            doubts=tuple(text.get("doubts", "").split()),
            tasks=(text["tasks"],) if "tasks" in text else TASKS,
        )


def told_values(env: Environment, names: Iterable[str]) -> list[str]:
    """``NAME=value`` of those that are set."""
    return [f"{name}={env.set[name][:_SHOWN]}" for name in names if name in env.set]


def _late(env: Environment, name: str, limit: str) -> bool:
    """Whether a limit in seconds is not below another one; 0 is for ever."""
    first, last = env.number(name), env.number(limit)
    return bool(first is not None and last and (first == 0 or first >= last))


def _event_early(env: Environment) -> bool:
    # TorchNPU derives the limit of events from HCCL_EXEC_TIMEOUT where only that is set.
    event, execute = env.number("HCCL_EVENT_TIMEOUT"), env.number("HCCL_EXEC_TIMEOUT")
    return env.is_set("HCCL_EVENT_TIMEOUT") and bool(event) and execute is not None and not 0 < execute < (event or 0)


def _aiv_too_long(env: Environment) -> bool:
    seconds = env.number("HCCL_EXEC_TIMEOUT") or 0
    return env["HCCL_OP_EXPANSION_MODE"] == "AIV" and env.is_set("HCCL_EXEC_TIMEOUT") and seconds > _AIV_LONGEST


def _links(env: Environment) -> tuple[str, str]:
    return env["HCCL_INTRA_PCIE_ENABLE"], env["HCCL_INTRA_ROCE_ENABLE"]


def _on(env: Environment, option: str) -> bool:
    return env.options(ALLOC).get(option) == "True"


def _reads_alloc_conf(env: Environment) -> bool | None:
    """Whether TorchNPU is new enough to read PYTORCH_ALLOC_CONF; None when its version is not known."""
    if env.older(_READS_ALLOC_CONF):
        return False
    return True if len(env.reached(_READS_ALLOC_CONF)) == len(_READS_ALLOC_CONF) else None


def _both_names(env: Environment) -> bool:
    return env.is_set("PYTORCH_ALLOC_CONF") and env.is_set(ALLOC)


def _saturates(env: Environment) -> bool:
    return env["INF_NAN_MODE_ENABLE"] == "0"


def _forced(env: Environment) -> bool:
    return env["INF_NAN_MODE_FORCE_DISABLE"] == "1"


def _to_terminal(env: Environment) -> bool:
    return (env.set.get("ASCEND_LOG_PRINT_TO_STDOUT") or env["ASCEND_SLOG_PRINT_TO_STDOUT"]) == "1"


_GATES: Sequence[tuple[Callable[[Environment, Option], list[str]], str, str]] = (
    (
        lambda env, option: env.older(option.since),
        "{name} of PYTORCH_NPU_ALLOC_CONF needs {versions} or newer: unsupported here",
        "PYTORCH_NPU_ALLOC_CONF 的 {name} 需要 {versions} 及以上，当前版本不支持",
    ),
    (
        lambda env, option: env.reached(option.deprecated),
        "{name} of PYTORCH_NPU_ALLOC_CONF is deprecated from {versions} on",
        "自 {versions} 起不再推荐使用 PYTORCH_NPU_ALLOC_CONF 的 {name}",
    ),
)


def _option_gates(env: Environment) -> Iterable[Finding]:
    """Options that the versions here do not know, or advise against."""
    variable, given = env.known[ALLOC], env.options(ALLOC)
    for option in (variable.options[name] for name in given if name in variable.options):
        for versions_of, english, chinese in _GATES:
            versions = versions_of(env, option)
            if versions:
                cause = say(english, chinese, name=option.name, versions=", ".join(versions))
                command = f"export {ALLOC}={variable.train}"
                yield Finding("ENV-ALLOC", Severity.WARN, cause, command, variable.source, doubts=(NPU,))


_TORCH_NPU = "Ascend/pytorch docs/zh/api/environment_variable"
_HCCL = "cann/hccl docs/zh/user_guide/hccl_env"

TOPICS = (
    Topic(
        "ENV-QUEUE",
        say("the task queue works, and nothing makes it wait", "任务队列生效，且没有设置强制同步"),
        ("ASCEND_LAUNCH_BLOCKING", "TASK_QUEUE_ENABLE", "PER_STREAM_QUEUE"),
        f"{_TORCH_NPU}/op_execution",
        {
            "blocking": lambda env: env["ASCEND_LAUNCH_BLOCKING"] == "1",
            "per_stream": lambda env: env["PER_STREAM_QUEUE"] == "1" and env["TASK_QUEUE_ENABLE"] == "0",
        },
    ),
    Topic(
        "ENV-ALLOC",
        say("the options of the memory allocator go together", "内存分配器选项相互兼容"),
        (ALLOC, "TORCH_HCCL_ZERO_COPY"),
        f"{_TORCH_NPU}/memory_management/PYTORCH_NPU_ALLOC_CONF.md",
        {
            "expandable_split": lambda env: (
                _on(env, "expandable_segments")
                and bool({"max_split_size_mb", "garbage_collection_threshold"} & set(env.options(ALLOC)))
            ),
            "pinned_twice": lambda env: _on(env, "pinned_mem_register") and _on(env, "pin_memory_expandable_segments"),
            "page_size": lambda env: "page_size" in env.options(ALLOC) and len(env.options(ALLOC)) > 1,
            "zero_copy": lambda env: env["TORCH_HCCL_ZERO_COPY"] == "1" and not _on(env, "expandable_segments"),
        },
        _option_gates,
    ),
    Topic(
        "ENV-ALLOC-NAMES",
        say("the memory allocator is configured by one name", "内存分配器只用一个变量名配置"),
        ("PYTORCH_ALLOC_CONF", ALLOC),
        _TORCH_NPU,
        {
            "both": lambda env: _both_names(env) and _reads_alloc_conf(env) is True,
            "both_soon": lambda env: _both_names(env) and not _reads_alloc_conf(env),
            "wrong_name": lambda env: not env.is_set(ALLOC) and _reads_alloc_conf(env) is False,
        },
    ),
    Topic(
        "ENV-HCCL-TIMEOUTS",
        say("HCCL's time limits are in order: connect < execute < event", "HCCL 超时满足：建链 < 执行 < event"),
        ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT"),
        f"{_HCCL}; {_TORCH_NPU}",
        {
            "connect_late": lambda env: _late(env, "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"),
            "event_early": _event_early,
            "aiv_long": _aiv_too_long,
        },
    ),
    Topic(
        "ENV-EXPANSION",
        say("HCCL's expansion mode fits what is asked of it", "HCCL 编排展开位置与其他设置相符"),
        ("HCCL_OP_EXPANSION_MODE", "HCCL_OP_RETRY_ENABLE", "HCCL_DETERMINISTIC"),
        _HCCL,
        {
            "retry": lambda env: (
                ":1" in env["HCCL_OP_RETRY_ENABLE"] and env["HCCL_OP_EXPANSION_MODE"] not in ("", "AI_CPU")
            ),
            "deterministic": lambda env: (
                env["HCCL_OP_EXPANSION_MODE"] == "AIV" and env["HCCL_DETERMINISTIC"] in ("true", "strict")
            ),
            "training": lambda env: env.set.get("HCCL_OP_EXPANSION_MODE") == "AIV",
        },
    ),
    Topic(
        "ENV-INTRA-LINK",
        say("HCCL's PCIe and RoCE switches are a legal pair", "HCCL 的 PCIe/RoCE 开关组合合法"),
        ("HCCL_INTRA_PCIE_ENABLE", "HCCL_INTRA_ROCE_ENABLE"),
        "https://www.hiascend.com/document/detail/zh/canncommercial/latest/API/hcclug/hcclenvref_07_0006.html",
        {"pair": lambda env: _links(env) in (("1", "1"), ("0", ""), ("", "0"))},
    ),
    Topic(
        "ENV-SLOG",
        say("CANN logs errors, to files", "CANN 仅记录错误并写入文件"),
        ("ASCEND_SLOG_PRINT_TO_STDOUT", "ASCEND_LOG_PRINT_TO_STDOUT", "ASCEND_GLOBAL_LOG_LEVEL"),
        "cann/runtime docs/zh/env_vars",
        {"no_files": _to_terminal, "verbose": lambda env: env["ASCEND_GLOBAL_LOG_LEVEL"] in ("0", "1")},
    ),
    Topic(
        "ENV-INF-NAN",
        say("overflow gives inf and nan", "溢出时输出 inf/nan"),
        ("INF_NAN_MODE_ENABLE", "INF_NAN_MODE_FORCE_DISABLE"),
        _TORCH_NPU,
        {
            "refused": lambda env: _saturates(env) and env.soc in (A2, A3) and not _forced(env),
            "perhaps_refused": lambda env: _saturates(env) and not env.soc and not _forced(env),
            "saturates": lambda env: _saturates(env) and _forced(env),
        },
    ),
    Topic(
        "ENV-MAX-CONNECTIONS",
        say(
            "CUDA_DEVICE_MAX_CONNECTIONS is what Megatron insists on",
            "CUDA_DEVICE_MAX_CONNECTIONS 满足 Megatron 的检查",
        ),
        ("CUDA_DEVICE_MAX_CONNECTIONS",),
        "Megatron-LM core_v0.12.1 megatron/training/arguments.py",
        {"not_one": lambda env: env["CUDA_DEVICE_MAX_CONNECTIONS"] != "1"},
    ),
)
