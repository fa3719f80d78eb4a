"""What a report says to do, as steps with their undo, for the script that `render.fix_script` writes. Pure.

A command may quote texts of a snapshot, and a snapshot may come from anywhere. So only commands of a few known kinds,
rebuilt word by word, stand in the script ready to run: those of pip, and those that set a variable or a limit, or
source a script. Whatever else a finding names stands there as a comment, with the reason.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Iterator, NamedTuple, Sequence

from ascend_envcheck.findings import Finding, Report, Severity
from ascend_envcheck.messages import say
from ascend_envcheck.probes.python import DISTRIBUTIONS, variables
from ascend_envcheck.snapshot import UNLIMITED, Snapshot
from ascend_envcheck.tables import WHEELS

NEEDS_ROOT = say("needs root", "需要 root 权限")
DOWNLOADS = say("downloads or installs what is not a Python package", "会下载或安装 Python 包以外的内容")
ELSEWHERE = say("starts or makes a container or an environment", "会启动或创建容器或环境")
HAS_PLACEHOLDER = say("has a placeholder for you to fill in", "含有需要自行填写的占位符")
NOT_KNOWN = say("is not of a kind that this script could undo", "不属于本脚本能够撤销的类型")

_ROOT = re.compile(
    r"(?<![\w-])(sudo|su|usermod|gpasswd|sysctl|modprobe|mount|systemctl|reboot|apt|apt-get|yum|dnf)\b|/etc/"
)
_DOWNLOAD = re.compile(r"\b(wget|curl|git\s+clone|docker\s+pull)\b|\.(run|rpm|deb)\b")
_ELSEWHERE = re.compile(r"\b(docker|podman|conda|mamba|virtualenv|venv)\b")
_PLACEHOLDER = re.compile(
    r"…|\.\.\.|<[^<>=\s]+>|"
    r"(?<![\w$./-])(?!(?:TRUE|FALSE|INFO|WARN|WARNING|ERROR|DEBUG)\b)[A-Z][A-Z_]{2,}(?![\w=./-])"
)
_IN_QUOTES = re.compile(r"'[^']*'")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.,:/=<>!~+@\[\]*%-]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(\[[A-Za-z0-9,._-]+\])?([=<>!~]=?[A-Za-z0-9.,<>=!~*+]+)?\Z")
_VERSION = re.compile(r"[A-Za-z0-9.+!_-]+\Z")
_WITH_VALUE = ("--index-url", "--extra-index-url", "-i")
_ALONE = ("--no-deps", "--upgrade", "-U", "--no-cache-dir", "--force-reinstall", "-y", "--yes", "--pre")
_REFERENCE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
_HOME = re.compile(r"(?:(?<=:)|^)~(?=[/:]|$)")
_TOKEN = re.compile(r"\b(ip4|ip6|mac|id)-[0-9a-f]{8}\b|\*\*\*|<user>")


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Args:
        id: by which it is run.
        cause: why, in one line.
        source: where that is known from.
        do: the command; of a held step as the finding had it.
        undo: commands that take it back; none where that is not known.
        shell: whether it changes the shell of the caller, and so is printed for it to evaluate.
        note: what its undo does not do.
        held: why it is only a comment; empty when it is ready to run.
    """

    id: str
    cause: str
    source: str
    do: str
    undo: tuple[str, ...] = ()
    shell: bool = False
    note: str = ""
    held: str = ""


def steps(report: Report, snapshot: Snapshot) -> tuple[Step, ...]:
    """What the FAIL and then the WARN findings say to do, each command once."""
    found: dict[str, Step] = {}
    taken: set[str] = set()
    for finding in report.findings:
        if finding.severity not in (Severity.FAIL, Severity.WARN) or finding.command in ("", *found):
            continue
        base = finding.id or "STEP"
        names = (base if n == 1 else f"{base}-{n}" for n in range(1, len(taken) + 2))
        id_ = next(name for name in names if name not in taken)
        taken.add(id_)
        found[finding.command] = _step(id_, finding, snapshot)
    return tuple(found.values())


def _step(id_: str, finding: Finding, snapshot: Snapshot) -> Step:
    command, cause, source = finding.command, finding.cause, finding.source
    words = _words(command)
    if words and (words[0] == "unset" or not _PLACEHOLDER.search(" ".join(words))):
        ready = _pip(words, snapshot) or _variable(words, snapshot) or _source(words) or _limit(words, snapshot)
        if ready is not None:
            return Step(id_, cause, source, *ready)
    return Step(id_, cause, source, command, _undo_by_root(words or [], snapshot), held=_why_held(command))


def _why_held(command: str) -> str:
    bare = _IN_QUOTES.sub("''", command.split(" #")[0])  # in quotes are patterns and programs
    for pattern, reason in _HOLDS:
        if pattern.search(bare):
            return reason
    return NOT_KNOWN


def _words(command: str) -> list[str] | None:
    """The words of one simple command; None where a shell would do more with the line than run one program."""
    if not command.isprintable() or re.search(r"\S#", command):  # shlex takes every # for a comment
        return None
    reader = shlex.shlex(command, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    try:
        words = list(reader)
    except ValueError:  # a quote that is not closed
        return None
    return None if any(set(word) <= set("();<>|&") for word in words) else words


_HOLDS = ((_ROOT, NEEDS_ROOT), (_DOWNLOAD, DOWNLOADS), (_ELSEWHERE, ELSEWHERE), (_PLACEHOLDER, HAS_PLACEHOLDER))


class _Ready(NamedTuple):
    """The last fields of a `Step` that is ready to run."""

    do: str
    undo: tuple[str, ...] = ()
    shell: bool = False
    note: str = ""


def _pip(words: Sequence[str], snapshot: Snapshot) -> _Ready | None:
    """``pip install`` and ``pip uninstall`` of plain requirements; the undo restores the versions of the snapshot."""
    if list(words[:2]) not in (["pip", "install"], ["pip", "uninstall"]):
        return None
    options, names, rest = [], [], list(words[2:])
    while rest:
        word = rest.pop(0)
        requirement = _REQUIREMENT.match(word)
        if word in _WITH_VALUE and rest and rest[0].startswith("https://") and not _UNSAFE.search(rest[0]):
            options += [word, rest.pop(0)]
        elif word in _ALONE:
            options.append(word)
        elif requirement:
            names.append(requirement[1])
        else:
            return None
    if not names:
        return None
    return _Ready(_joined(words), tuple(_pip_undo(words[1], names, options, snapshot)), note=_PIP_NOTE)


_PIP_NOTE = say(
    "restores these packages, not what pip changed along with them",
    "只恢复这些软件包，不恢复 pip 连带更改的其他软件包",
)


def _pip_undo(verb: str, names: Sequence[str], options: Sequence[str], snapshot: Snapshot) -> Iterator[str]:
    versions = {_normal(name): found.version for name, found in snapshot.distributions.items()}
    before = [(name, versions.get(_normal(name))) for name in names]
    if any(version is None and _normal(name) not in map(_normal, DISTRIBUTIONS) for name, version in before):
        return  # nobody looked whether it was installed
    kept = [option for option in options if option not in ("-y", "--yes", "-U", "--upgrade", "--no-deps")]
    pins = [f"{name}=={version}" for name, version in before if version and _VERSION.match(version)]
    new = [name for name, version in before if version is None]
    if verb == "install" and new:
        yield _joined(["pip", "uninstall", "-y", *new])
    if pins:
        # What was there may not go together, which is why it was changed: pip would refuse it.
        yield _joined(["pip", "install", "--no-deps", *pins, *kept, *_index_of(pins, kept)])


def _index_of(pins: Sequence[str], options: Sequence[str]) -> Sequence[str]:
    """PyTorch's index of a build with a label (+cpu, +cu121), which PyPI does not have; none where one is named."""
    labels = [found[1] for found in map(_LABEL.search, pins) if found]
    return ["--extra-index-url", f"{WHEELS}/{labels[0]}"] if labels and not {*options} & {*_WITH_VALUE} else []


_LABEL = re.compile(r"\+(cpu|cu\d+)\Z")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _variable(words: Sequence[str], snapshot: Snapshot) -> _Ready | None:
    """``export NAME=value`` and ``unset NAME``; the undo sets what the snapshot had."""
    if len(words) != 2 or words[0] not in ("export", "unset"):
        return None
    name, equals, value = words[1].partition("=")
    if not _NAME.match(name) or bool(equals) != (words[0] == "export") or _UNSAFE.search(_REFERENCE.sub("", value)):
        return None
    do = f"export {name}={_quoted(value, references=True)}" if equals else f"unset {name}"
    before = snapshot.variables.get(name)
    if before is None:
        return _Ready(do, (f"unset {name}",) if name in variables({name: ""}) else (), shell=True)
    known = before.isprintable() and not _TOKEN.search(before)
    return _Ready(do, (f"export {name}={_quoted(before)}",) if known else (), shell=True)


def _source(words: Sequence[str]) -> _Ready | None:
    if len(words) == 2 and words[0] in ("source", ".") and re.match(r"(/|~/)", words[1]):
        return _Ready(f"source {_quoted(words[1])}", shell=True)
    return None


def _limit(words: Sequence[str], snapshot: Snapshot) -> _Ready | None:
    """``ulimit -n 65535`` and the like, soft, which can be undone; ``-n`` and ``-u`` count, the others have units."""
    if (
        len(words) != 3
        or words[0] != "ulimit"
        or words[1] not in _LIMITS
        or not re.match(r"([0-9]+|unlimited)\Z", words[2])
    ):
        return None
    before = snapshot.host.limits.get(_LIMITS[words[1]])
    undo = () if before is None or words[1] not in ("-n", "-u") else (f"ulimit -S {words[1]} {_spelled(before)}",)
    return _Ready(f"ulimit -S {words[1]} {words[2]}", undo, shell=True)


_LIMITS = {"-n": "nofile", "-u": "nproc", "-l": "memlock", "-s": "stack", "-c": "core"}


def _spelled(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else str(limit)


def _undo_by_root(words: Sequence[str], snapshot: Snapshot) -> tuple[str, ...]:
    """The undo of ``sudo sysctl -w KEY=VALUE`` and ``sudo usermod -aG GROUP USER``."""
    line = list(words[1:] if words[:1] == ["sudo"] else words)
    if line[:2] == ["sysctl", "-w"] and len(line) == 3:
        key = line[2].partition("=")[0]
        before = snapshot.files.get("/proc/sys/" + key.replace(".", "/"), "").strip()
        if key == "net.ipv4.ip_local_reserved_ports" and snapshot.host.live:
            before = before or snapshot.host.reserved_ports
            return (_joined(["sudo", "sysctl", "-w", f"{key}={before}"]),)
        return (_joined(["sudo", "sysctl", "-w", f"{key}={before}"]),) if before else ()
    if line[:2] == ["usermod", "-aG"] and len(line) == 4 and _NAME.match(line[2]):
        user = '"$USER"' if line[3] == "$USER" else shlex.quote(line[3])
        return (f"sudo gpasswd -d {user} {line[2]}",)
    return ()


def _joined(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def _quoted(value: str, *, references: bool = False) -> str:
    """A value for the shell; ``~``, as snapshots write the home folder, becomes ``"$HOME"`` where a path begins.

    With ``references``, ``$NAME`` stays what it is to a shell, too.
    """
    value = _HOME.sub("${HOME}", value) if references else value
    pattern = _REFERENCE if references else _HOME
    quoted, end = "", 0
    for found in pattern.finditer(value):
        name = (found[1] or found[2]) if references else "HOME"
        quoted += _plain(value[end : found.start()]) + f'"${name}"'
        end = found.end()
    return quoted + _plain(value[end:]) or "''"


def _plain(text: str) -> str:
    return shlex.quote(text) if text else ""
