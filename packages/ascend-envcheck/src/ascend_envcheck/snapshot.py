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

SCHEMA_VERSION = 2

NOT_RUN, OK, FAILED, CRASHED, TIMEOUT, MISSING = "not-run", "ok", "failed", "crashed", "timeout", "missing"
"""What became of something that was tried: a command, a probe, the import of a module."""

UNLIMITED = -1


@dataclass(frozen=True)
class PythonFacts:
    """The interpreter that ran the probes."""

    version: str = ""  # 3.11.2
    implementation: str = ""  # CPython
    system: str = ""  # Linux
    machine: str = ""  # x86_64, aarch64
    executable: str = ""
    on_path: str = ""  # what python3 on PATH is


@dataclass(frozen=True)
class Distribution:
    """An installed distribution, from its metadata; nothing of it was imported."""

    version: str
    requires: tuple[str, ...] = ()  # its requirements, as written


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
    cxx11_abi: bool | None = None  # torch._C._GLIBCXX_USE_CXX11_ABI
    device: str = ""  # torch.accelerator's device type: npu, cuda, …; "" when there is none
    device_count: int = 0
    device_detail: str = ""  # last line of the error when asking for it failed


@dataclass(frozen=True)
class CommandFacts:
    """A command, a probe or a library that was tried, or that was not there."""

    outcome: str = NOT_RUN
    detail: str = ""  # why it failed, in words
    output: str = ""  # stdout, then stderr


@dataclass(frozen=True)
class DiskFacts:
    """The file system that a folder lies on."""

    total: int = 0  # bytes
    free: int = 0  # bytes, for a user who is not root
    free_inodes: int | None = None  # None where the file system does not count them


@dataclass(frozen=True)
class HostFacts:
    """The machine around the interpreter; what is empty or None was not to be seen."""

    live: bool = False  # False: a copy of a machine's files; what only a running kernel knows is not here
    os_name: str = ""  # Ubuntu 22.04.4 LTS
    libc: str = ""  # glibc 2.35
    kernel: str = ""  # 5.10.0-136.12.0.86.aarch64
    container: str = ""  # docker, kubernetes, …; "" on bare metal
    root: bool | None = None
    groups: tuple[str, ...] = ()  # of this user, by name
    cpus: int | None = None
    governor: str = ""  # performance, …
    memory: Mapping[str, int] = field(default_factory=dict)  # /proc/meminfo: MemTotal (kB), HugePages_Free (pages), …
    huge_pages: str = ""  # transparent_hugepage/enabled: always, madvise, never
    limits: Mapping[str, int] = field(default_factory=dict)  # soft, by the name of ulimit; -1 is unlimited
    disks: Mapping[str, DiskFacts] = field(default_factory=dict)  # by what the folder is for: home, shm, tmp, cwd, log
    reserved_ports: str = ""  # net.ipv4.ip_local_reserved_ports
    listening: tuple[int, ...] = ()  # TCP ports
    interfaces: Mapping[str, str] = field(default_factory=dict)  # network interface to up, down or unknown


@dataclass(frozen=True)
class Snapshot:
    """All facts of one machine.

    Args:
        python: the interpreter.
        host: the machine around it.
        distributions: name to version, for the few that the rules ask about; absent means not installed.
        imports: the outcome of importing torch and torch_npu.
        commands: what was asked, as it is typed ("npu-smi info -t board -i 0"), to what came of it.
        devices: NPU device nodes, each "rw" or "denied".
        cann_homes: folders that hold a CANN toolkit, the one that wins first.
        files: small text files (version.info and the like), path to text.
        paths: existing paths that the rules ask about, each with what it resolves to.
        folders: the names in a few folders that the rules ask about.
        libraries: library name to the folders of LD_LIBRARY_PATH that have it, the one that wins first.
        loads: library name to the outcome of loading it in a child process.
        variables: environment variables, of an allow-list; nothing else of the environment is kept.
        probes: the probes that did not end well, by name.
    """

    python: PythonFacts = PythonFacts()
    host: HostFacts = HostFacts()
    distributions: Mapping[str, Distribution] = field(default_factory=dict)
    imports: ImportFacts = ImportFacts()
    commands: Mapping[str, CommandFacts] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)
    cann_homes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    libraries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    loads: Mapping[str, CommandFacts] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    probes: Mapping[str, CommandFacts] = field(default_factory=dict)
    tool_version: str = __version__
    schema_version: int = SCHEMA_VERSION

    def command(self, line: str) -> CommandFacts:
        """What came of a command; `NOT_RUN` when it was not."""
        return self.commands.get(line, CommandFacts())

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


def _list(kind: type, value: Any, where: str) -> tuple[Any, ...]:
    items = _plain(list, value, where)
    return tuple(_plain(kind, item, f"{where}[{number}]") for number, item in enumerate(items))


def _mapping(read: Callable[[Any, str], Any], value: Any, where: str) -> dict[str, Any]:
    return {key: read(item, f"{where}.{key}") for key, item in _plain(dict, value, where).items()}


def _name(value: object) -> str:
    return "null" if value is None else _NAMES.get(type(value), "a number")


_NAMES = {str: "a string", bool: "true or false", int: "an integer", dict: "an object", list: "a list"}

_READERS: Mapping[str, Callable[[Any, str], Any]] = {
    "str": partial(_plain, str),
    "int": partial(_plain, int),
    "bool": partial(_plain, bool),
    "int | None": partial(_plain, int, null=True),
    "bool | None": partial(_plain, bool, null=True),
    "tuple[str, ...]": partial(_list, str),
    "tuple[int, ...]": partial(_list, int),
    "Mapping[str, int]": partial(_mapping, partial(_plain, int)),
    "Mapping[str, str]": partial(_mapping, partial(_plain, str)),
    "Mapping[str, tuple[str, ...]]": partial(_mapping, partial(_list, str)),
    **{
        form.format(kind.__name__): read
        for kind in (PythonFacts, HostFacts, ImportFacts, CommandFacts, DiskFacts, Distribution)
        for form, read in (
            ("{}", partial(_decode, kind)),
            ("Mapping[str, {}]", partial(_mapping, partial(_decode, kind))),
        )
    },
}
