"""The environment variables of a snapshot, with what they depend on."""

from __future__ import annotations

from typing import Mapping

from ascend_envcheck.probes.redact import MASKED
from ascend_envcheck.rules.cann import active_version
from ascend_envcheck.rules.torch_stack import version_of
from ascend_envcheck.snapshot import Snapshot
from ascend_envcheck.tables import find_torch_npu
from ascend_envcheck.variables import Variable, options_of, variables, whole_number
from ascend_envcheck.versions import pairs, release

COMPONENTS = {"torch": "torch", "torch_npu": "TorchNPU", "cann": "CANN", "driver": "Ascend HDK"}
"""What a variable may depend on, by the name in the table, with the name that people use."""

A2, A3 = "ascend910b", "ascend910_93"


class Environment:
    """What is set on a machine, what holds where nothing is set, and the versions that read it."""

    def __init__(self, snapshot: Snapshot) -> None:
        from ascend_envcheck.rules.npu import soc

        self.snapshot = snapshot
        self.soc = soc(snapshot)
        self.known: Mapping[str, Variable] = variables(self.soc)
        # A masked value is set, and nobody knows to what.
        self.set = {name: value for name, value in snapshot.variables.items() if value != MASKED}
        self.values = {**{name: variable.default for name, variable in self.known.items()}, **self.set}

    def __getitem__(self, name: str) -> str:
        """The value that holds: the one that is set, else the default, else ""."""
        return self.values.get(name, "")

    def is_set(self, name: str) -> bool:
        """Whether a variable is set to something."""
        return bool(self.set.get(name))

    def number(self, name: str) -> int | None:
        """The number that holds, None for what is no legal one."""
        value = self[name]
        variable = self.known.get(name)
        return whole_number(value) if variable is None or variable.allows(value) else None

    def options(self, name: str) -> Mapping[str, str]:
        """The options of a list that holds."""
        return options_of(self[name])

    def version(self, component: str) -> str:
        """The version of a component (a key of `COMPONENTS`), "" when it is not known."""
        return _VERSIONS[component](self.snapshot) or ""

    def older(self, needs: Mapping[str, str]) -> list[str]:
        """The components that are here in an older version than needed, as people would say it."""
        return [f"{COMPONENTS[name]} {first}" for name, first in needs.items() if self._is_older(name, first)]

    def reached(self, ends: Mapping[str, str]) -> list[str]:
        """The components that are here in the version named, or a newer one."""
        return [
            f"{COMPONENTS[name]} {first}"
            for name, first in ends.items()
            if self.version(name) and release(self.version(name)) and not self._is_older(name, first)
        ]

    def _is_older(self, component: str, first: str) -> bool:
        here, needed = release(self.version(component)), release(first)
        return here is not None and needed is not None and here < needed

    def machines(self) -> int | None:
        """How many machines the job spans, as far as the launcher has told; None when it has not."""
        for name in ("NNODES", "GROUP_WORLD_SIZE"):
            if whole_number(self[name]):
                return whole_number(self[name])
        world, local = whole_number(self["WORLD_SIZE"]), whole_number(self["LOCAL_WORLD_SIZE"])
        return -(-world // local) if world and local else None


def _train(snapshot: Snapshot) -> str | None:
    """The TorchNPU release (7.1.0) of an installed torch_npu (2.6.0)."""
    installed = version_of(snapshot, "torch_npu")
    row = find_torch_npu(installed) if installed else None
    return row.release if row else None


def _driver(snapshot: Snapshot) -> str | None:
    texts = (text for path, text in snapshot.files.items() if path.endswith("/driver/version.info"))
    return next((version for version in (pairs(text).get("version") for text in texts) if version), None)


_VERSIONS = {
    "torch": lambda snapshot: version_of(snapshot, "torch") or version_of(snapshot, "torch_npu"),
    "torch_npu": _train,
    "cann": active_version,
    "driver": _driver,
}
