"""The interpreter, its installed distributions and the environment variables."""

from __future__ import annotations

from typing import Mapping, Sequence

from ascend_envcheck.snapshot import Distribution, PythonFacts

DISTRIBUTIONS = ("torch", "torch_npu", "torchvision", "transformers", "megatron-core", "psutil")

VARIABLES = (
    "ASCEND_HOME_PATH",
    "ASCEND_TOOLKIT_HOME",
    "ASCEND_DRIVER_PATH",
    "ATB_HOME_PATH",
    "LD_LIBRARY_PATH",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)
"""Only these are written down: an environment holds secrets under any name."""


def python() -> PythonFacts:
    """The interpreter that runs this."""
    import platform

    return PythonFacts(
        version=platform.python_version(),
        implementation=platform.python_implementation(),
        system=platform.system(),
        machine=platform.machine(),
    )


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the allow-list that are set."""
    return {name: environ[name] for name in VARIABLES if name in environ}


def distributions(search_path: Sequence[str]) -> dict[str, Distribution]:
    """The distributions that the rules ask about, from metadata; a half-removed one counts as not installed."""
    found = {name: _distribution(name, list(search_path)) for name in DISTRIBUTIONS}
    return {name: distribution for name, distribution in found.items() if distribution is not None}


def _distribution(name: str, search_path: Sequence[str]) -> Distribution | None:
    import importlib.metadata  # 20 ms, which `--help` need not pay

    for candidate in importlib.metadata.distributions(name=name, path=list(search_path)):
        try:
            version = candidate.version
            requires = candidate.requires or ()
        except (OSError, ValueError, KeyError, TypeError):  # metadata that is gone, empty or not text
            continue
        if version:
            return Distribution(str(version), tuple(line for line in requires if _is_on_torch(line)))
    return None


def _is_on_torch(requirement: str) -> bool:
    name = requirement.replace("(", " ").replace("=", " ").replace(">", " ").split()
    return bool(name) and name[0].lower() == "torch"
