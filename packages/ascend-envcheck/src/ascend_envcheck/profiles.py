"""Which environment variables to set for a task, to what, and why. Nothing is set by it."""

from __future__ import annotations

from dataclasses import dataclass

from ascend_envcheck.findings import TASKS
from ascend_envcheck.messages import Message
from ascend_envcheck.variables import NOTHING, Variable, variables

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ascend_envcheck.rules.environment import Environment
    from ascend_envcheck.snapshot import Snapshot

# What matters most first: speed and memory of a single NPU, then many of them, then logs, then the host.
_ORDER = (
    *("TASK_QUEUE_ENABLE", "PYTORCH_NPU_ALLOC_CONF", "CPU_AFFINITY_CONF", "COMBINED_ENABLE", "HCCL_CONNECT_TIMEOUT"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "HCCL_OP_EXPANSION_MODE", "ACLNN_CACHE_LIMIT", "ACL_OP_COMPILER_CACHE_MODE"),
    *("ASCEND_LAUNCH_BLOCKING", "ASCEND_GLOBAL_LOG_LEVEL", "ASCEND_GLOBAL_EVENT_ENABLE"),
    *("ASCEND_LOG_PRINT_TO_STDOUT", "ASCEND_SLOG_PRINT_TO_STDOUT", "TOKENIZERS_PARALLELISM"),
    *("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "OMP_NUM_THREADS", "ASCEND_PROCESS_LOG_PATH"),
)


@dataclass(frozen=True)
class Entry:
    """A recommended variable.

    Args:
        name: of the variable.
        value: what to set it to; "" where only the machine knows, `fill` says what to fill in.
        why: what it does for you.
        source: where the variable is documented.
        advice: where the recommendation comes from: walkthrough, official, scripts or judgement.
        fill: what to fill in.
        pitfalls: what to beware of.
    """

    name: str
    value: str
    why: Message
    source: str
    advice: str
    fill: Message = NOTHING
    pitfalls: Message = NOTHING


def env_profile(name: str, *, snapshot: Snapshot | None = None) -> tuple[Entry, ...]:
    """The variables that a task wants, the most important first.

    Args:
        name: train (fine-tuning Qwen2.5-VL) or infer (Wan2.1).
        snapshot: the machine, whose NPU and CANN decide on some; without it, those that are right everywhere.

    Raises:
        ValueError: a profile that does not exist.
    """
    if name not in TASKS:
        raise ValueError(f"no profile {name!r}; there are {' and '.join(TASKS)}")
    env = _environment(snapshot) if snapshot is not None else None
    known = env.known if env is not None else variables()
    return tuple(
        Entry(each.name, each.recommended(name), each.why, each.source, each.advice, each.fill, each.pitfalls)
        for each in (known[wanted] for wanted in _ORDER)
        if (each.recommended(name) or each.fill) and _is_read(each, env)
    )


def _environment(snapshot: Snapshot) -> Environment:
    from ascend_envcheck.rules.environment import Environment

    return Environment(snapshot)


def _is_read(variable: Variable, env: Environment | None) -> bool:
    """Whether the versions here read a variable and want its name; where they are not known, what most versions do."""
    if env is None:
        return not variable.since
    return len(env.reached(variable.since)) == len(variable.since) and not env.reached(variable.deprecated)
