"""Where a command has its snapshot from: a file, or this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from ascend_envcheck.commands.terminal import progress
from ascend_envcheck.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ascend_envcheck.snapshot import Snapshot


def add_probing(parser: argparse.ArgumentParser) -> None:
    """Declare how this machine is looked at."""
    parser.add_argument(
        "--import_seconds",
        type=_seconds,
        default=120.0,
        metavar="N",
        help="time limit for importing torch in a child process (default: %(default)g)",
    )
    parser.add_argument("--root", default="/", metavar="FOLDER", help="look at the files of a machine that lie here")
    parser.add_argument("--smoke", action="store_true", help="compute a little on every NPU, too")
    parser.add_argument("--peers", type=Path, metavar="HOSTFILE", help="reach the NPUs of these addresses, too")


def read_snapshot(path: Path) -> Snapshot:
    """The snapshot in a file.

    Raises:
        SnapshotError: it holds none; the message names the file.
        OSError: it can't be read.
    """
    from ascend_envcheck.snapshot import Snapshot

    try:
        return Snapshot.from_json(path.read_text(encoding="utf-8"))
    except (SnapshotError, UnicodeDecodeError) as error:
        raise SnapshotError(f"{path}: {error}") from error


def look_here(options: argparse.Namespace, *, import_torch: bool = True) -> Snapshot:
    """A snapshot of this machine, with progress on a terminal."""
    from ascend_envcheck.probes import collect

    peers = _addresses(options.peers) if options.peers is not None else ()
    with progress() as tell:
        return collect(
            root=options.root,
            import_torch=import_torch,
            import_seconds=options.import_seconds,
            smoke=options.smoke,
            peers=peers,
            progress=tell,
        )


def _addresses(path: Path) -> tuple[str, ...]:
    """The first word of each line, as in the hostfile of a launcher; ``#`` starts a comment."""
    lines = (line.partition("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines())
    return tuple(words[0] for words in lines if words)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds between 0 and 86400")
    return value
