"""Is this machine fit to fine-tune Qwen2.5-VL and to run Wan2.1, and if not, why not?

    >>> from ascend_envcheck import check, collect
    >>> snapshot = collect()                       # facts of this machine; torch is imported in a child process
    >>> report = check(snapshot)                   # pure: the same snapshot gives the same report, anywhere
    >>> [f.id for f in report.findings if f.severity == "FAIL"]
    []
    >>> print(report.verdicts[0])
    this machine can fine-tune Qwen2.5-VL on CPU: yes (tiny models)

`collect` probes and never judges; a `Snapshot` is what it saw, and travels as JSON (`Snapshot.to_json`,
`Snapshot.from_json`); `check` judges by `RULES`, or by rules of yours, and never probes. `explain` reads a failed log,
`env_profile` tells which variables to set, `solve` which versions fit together. What people read is made by `say`, in
two languages. Names are loaded when first used: importing this costs about a millisecond.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself would be most of the cost of this import
if TYPE_CHECKING:
    from typing import Any

    from ascend_envcheck.compat.solver import solve
    from ascend_envcheck.errors import (
        EnvcheckError,
        LogError,
        OutputExistsError,
        PackError,
        SchemaError,
        SnapshotError,
        UnknownRuleError,
        VersionError,
    )
    from ascend_envcheck.explanation import explain
    from ascend_envcheck.findings import Finding, Report, Severity, Verdict
    from ascend_envcheck.judge import check
    from ascend_envcheck.messages import Message, say
    from ascend_envcheck.probes import collect
    from ascend_envcheck.profiles import env_profile
    from ascend_envcheck.rules import RULES
    from ascend_envcheck.rules.rule import Rule
    from ascend_envcheck.snapshot import SCHEMA_VERSION, Snapshot

__version__ = "0.1.0"

_HOMES = {
    "collect": "probes",
    "Snapshot": "snapshot",
    "check": "judge",
    "explain": "explanation",
    "env_profile": "profiles",
    "solve": "compat.solver",
    "Report": "findings",
    "Finding": "findings",
    "Severity": "findings",
    "Verdict": "findings",
    "RULES": "rules",
    "Rule": "rules.rule",
    "Message": "messages",
    "say": "messages",
    "SCHEMA_VERSION": "snapshot",
    "EnvcheckError": "errors",
    "SnapshotError": "errors",
    "UnknownRuleError": "errors",
    "OutputExistsError": "errors",
    "PackError": "errors",
    "VersionError": "errors",
    "SchemaError": "errors",
    "LogError": "errors",
}

__all__ = [
    "collect",
    "Snapshot",
    "check",
    "explain",
    "env_profile",
    "solve",
    "Report",
    "Finding",
    "Severity",
    "Verdict",
    "RULES",
    "Rule",
    "Message",
    "say",
    "SCHEMA_VERSION",
    "EnvcheckError",
    "SnapshotError",
    "UnknownRuleError",
    "OutputExistsError",
    "PackError",
    "VersionError",
    "SchemaError",
    "LogError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
