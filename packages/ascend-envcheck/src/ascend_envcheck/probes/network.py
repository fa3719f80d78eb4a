"""What the NPUs and the host say of their networks."""

from __future__ import annotations

import re
from typing import Mapping, Sequence

from ascend_envcheck.probes.place import Facts, Place
from ascend_envcheck.probes.tree import MAX_BYTES, Tree
from ascend_envcheck.snapshot import MISSING, OK, CommandFacts

TOOL = "hccn_tool"
QUESTIONS = ("-ip", "-link", "-net_health", "-tls", "-mtu")
"""Each is asked as ``hccn_tool -i N QUESTION -g``, which only reads; HCCN Tool reference."""

PINGS = ("-ping", "-hccs_ping")
"""Between servers over RoCE; where that does not arrive, between the servers of an A3 super node over HCCS."""

HCCN_CONF = "/etc/hccn.conf"
RANK_TABLE = "rank_table.json"
"""Key of the file that RANK_TABLE_FILE names, whatever that is called: it tells redaction that addresses are inside."""

MOUNT_POINTS = "/proc/self/mounts"
ASCEND = "/usr/local/Ascend"
MOUNTS = (
    "/usr/local/dcmi",
    "/usr/local/bin/npu-smi",
    f"{ASCEND}/driver/lib64",
    f"{ASCEND}/driver/version.info",
    "/etc/ascend_install.info",
    HCCN_CONF,
)
"""What a container must be given besides the device nodes; MindSpeed-MM and MindIE images, docker run."""


def look(place: Place) -> Facts:
    """hccn_tool's answers, the rank table, and what is mounted into a container."""
    tree, table = place.tree, place.environ.get("RANK_TABLE_FILE", "")
    paths = [*MOUNTS, table, table.rpartition("/")[0]]
    texts = {HCCN_CONF: tree.text(HCCN_CONF), RANK_TABLE: _whole(tree, table)}
    return {
        "commands": _answers(place),
        "files": {key: text for key, text in texts.items() if text is not None},
        "folders": {MOUNT_POINTS: _mount_points(tree.text(MOUNT_POINTS) or "")},
        "paths": {path: target for path, target in ((path, tree.resolve(path)) for path in paths) if target},
    }


def _whole(tree: Tree, path: str) -> str | None:
    """A text that was read to its end: JSON that is cut off would look like a fault of its writer."""
    text = tree.text(path) if path.startswith("/") else None
    return None if text is None or len(text.encode("utf-8", "replace")) >= MAX_BYTES else text


def _answers(place: Place) -> Mapping[str, CommandFacts]:
    numbers = [name[len("davinci") :] for name in place.tree.names("/dev") if re.fullmatch(r"davinci\d+", name)]
    if not numbers or place.find(TOOL) is None:
        return {" ".join(_ping("0", PINGS[0], peer)): CommandFacts(MISSING) for peer in place.peers}
    answers = place.run_all([(TOOL, "-i", number, question, "-g") for number in numbers for question in QUESTIONS])
    missed: Sequence[str] = place.peers
    for ping in PINGS:
        lines = {peer: _ping(numbers[at % len(numbers)], ping, peer) for at, peer in enumerate(missed)}
        answers.update(place.run_all(list(lines.values())))
        missed = [peer for peer, line in lines.items() if answers[" ".join(line)].outcome != OK]
    return answers


def _ping(number: str, ping: str, peer: str) -> tuple[str, ...]:
    return (TOOL, "-i", number, ping, "-g", "address", peer)


def _mount_points(mounts: str) -> tuple[str, ...]:
    points = (line.split(" ")[1] for line in mounts.splitlines() if line.count(" ") > 1)
    return tuple(sorted({point for point in points if point == ASCEND or point.startswith(f"{ASCEND}/")}))
