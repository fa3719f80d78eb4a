"""What was seen on a machine: raw facts, no judgement, as JSON.

A snapshot holds texts and version strings as they were found. Rules parse them, so that a better rule can
judge an old snapshot again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Callable, Mapping

from ascend_envcheck import __version__
from ascend_envcheck.errors import SnapshotError

SCHEMA_VERSION = 1

NOT_RUN, OK, FAILED, CRASHED, TIMEOUT, MISSING = "not-run", "ok", "failed", "crashed", "timeout", "missing"
"""What became of something that was tried: a command, or the import of a module."""


@dataclass(frozen=True)
class PythonFacts:
    """The interpreter that ran the probes."""

    version: str = ""  # 3.11.2
    implementation: str = ""  # CPython
    system: str = ""  # Linux
    machine: str = ""  # x86_64, aarch64


@dataclass(frozen=True)
class Distribution:
    """An installed distribution, from its metadata; nothing of it was imported."""

    version: str
    requires: tuple[str, ...] = ()  # its requirements on torch, as written


@dataclass(frozen=True)
class ImportFacts:
    """What a child process saw when it imported torch, and torch_npu where that is installed."""

    torch: str = NOT_RUN
    torch_detail: str = ""  # last line of the error
    torch_alone: str = NOT_RUN  # tried when `torch` failed: the same, without loading torch_npu along with it
    torch_version: str = ""
    torch_npu: str = NOT_RUN
    torch_npu_detail: str = ""
    accelerator_api: bool | None = None  # has torch.accelerator (torch 2.6 and newer)
    device: str = ""  # torch.accelerator's device type: npu, cuda, …; "" when there is none
    device_count: int = 0
    device_detail: str = ""  # last line of the error when asking for it failed


@dataclass(frozen=True)
class CommandFacts:
    """A command that was run, or that was not there."""

    outcome: str = NOT_RUN
    detail: str = ""  # why it failed, in words
    output: str = ""  # stdout, then stderr


@dataclass(frozen=True)
class Snapshot:
    """All facts of one machine.

    Args:
        python: the interpreter.
        distributions: name to version, for the few that the rules ask about; absent means not installed.
        imports: the outcome of importing torch and torch_npu.
        npu_smi: the outcome of ``npu-smi info``.
        devices: NPU device nodes, each "rw" or "denied".
        cann_homes: folders that hold a CANN toolkit, the one that wins first.
        files: small text files (version.info and the like), path to text.
        paths: existing paths that the rules ask about, each with what it resolves to.
        libraries: library name to the first folder of LD_LIBRARY_PATH that has it.
        variables: environment variables, of an allow-list; nothing else of the environment is kept.
    """

    python: PythonFacts = PythonFacts()
    distributions: Mapping[str, Distribution] = field(default_factory=dict)
    imports: ImportFacts = ImportFacts()
    npu_smi: CommandFacts = CommandFacts()
    devices: Mapping[str, str] = field(default_factory=dict)
    cann_homes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    tool_version: str = __version__
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The snapshot as JSON text, keys sorted, ending in a newline."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Snapshot:
        """Reads what `to_json` wrote. Unknown keys are ignored, missing or ill-typed ones refused.

        Raises:
            SnapshotError: not JSON, not a snapshot, or of a newer schema.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SnapshotError(
                f"not a snapshot: not JSON ({error}); write one with `ascend-envcheck snapshot`"
            ) from error
        given = data.get("schema_version") if isinstance(data, dict) else SCHEMA_VERSION
        if isinstance(given, int) and given != SCHEMA_VERSION:
            raise SnapshotError(
                f"the snapshot has schema_version {given}, this version reads {SCHEMA_VERSION}; "
                "use the ascend-envcheck that wrote it, or a newer one"
            )
        snapshot: Snapshot = _decode(cls, data, "snapshot")
        return snapshot


def _decode(kind: type, data: Any, where: str) -> Any:
    """One JSON value as a dataclass of this file; each field is read by what its annotation says."""
    if not isinstance(data, dict):
        raise SnapshotError(f"not a snapshot: {where} is {_name(data)}, must be an object")
    values = {}
    for item in fields(kind):
        place = f"{where}.{item.name}"
        if item.name not in data:
            raise SnapshotError(f"not a snapshot: {place} is missing; write one with `ascend-envcheck snapshot`")
        values[item.name] = _READERS[str(item.type)](data[item.name], place)
    return kind(**values)


def _plain(kind: type, value: Any, where: str, *, null: bool = False) -> Any:
    # bool is an int to Python, not to JSON.
    if (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))) or (null and value is None):
        return value
    raise SnapshotError(f"not a snapshot: {where} is {_name(value)}, must be {_NAMES[kind]}")


def _list(value: Any, where: str) -> tuple[Any, ...]:
    items = _plain(list, value, where)
    return tuple(_plain(str, item, f"{where}[{number}]") for number, item in enumerate(items))


def _mapping(read: Callable[[Any, str], Any], value: Any, where: str) -> dict[str, Any]:
    return {key: read(item, f"{where}.{key}") for key, item in _plain(dict, value, where).items()}


def _name(value: object) -> str:
    return "null" if value is None else _NAMES.get(type(value), "a number")


_NAMES = {str: "a string", bool: "true or false", int: "an integer", dict: "an object", list: "a list"}

_READERS: Mapping[str, Callable[[Any, str], Any]] = {
    "str": partial(_plain, str),
    "int": partial(_plain, int),
    "bool | None": partial(_plain, bool, null=True),
    "tuple[str, ...]": _list,
    "Mapping[str, str]": partial(_mapping, partial(_plain, str)),
    "Mapping[str, Distribution]": partial(_mapping, partial(_decode, Distribution)),
    "PythonFacts": partial(_decode, PythonFacts),
    "ImportFacts": partial(_decode, ImportFacts),
    "CommandFacts": partial(_decode, CommandFacts),
}
