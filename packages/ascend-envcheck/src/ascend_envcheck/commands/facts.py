"""Where a command has its snapshot from: a file, or this machine."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ascend_envcheck.commands.terminal import progress
from ascend_envcheck.errors import EnvcheckError, SnapshotError

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
        help="time limit for importing torch in a child process; 0 does not import it (default: %(default)g)",
    )
    parser.add_argument(
        "--root",
        default="/",
        metavar="FOLDER",
        help="look at the files of a machine that lie here; Python, its packages and variables are of this one",
    )
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
    except UnicodeDecodeError as error:
        raise SnapshotError(f"{path}: not a snapshot: not text in UTF-8 ({error})") from error
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}") from error


def snapshot_for(options: argparse.Namespace, *, import_torch: bool = True) -> Snapshot:
    """The snapshot that ``--from`` names, else one of this machine.

    Raises:
        SnapshotError: the file holds none.
        EnvcheckError: ``--from`` beside options that look at a machine, or as `look_here`.
        OSError: a file can't be read.
    """
    if options.source is None:
        return look_here(options, import_torch=import_torch)
    if options.root != "/" or options.smoke or options.peers is not None:
        raise EnvcheckError(
            "--from judges a snapshot; drop it, or --root, --smoke and --peers, which look at a machine"
        )
    return read_snapshot(options.source)


def look_here(options: argparse.Namespace, *, import_torch: bool = True) -> Snapshot:
    """A snapshot of this machine, with progress on a terminal.

    Raises:
        EnvcheckError: ``--root`` is no folder, ``--peers`` holds what is no address, ``--smoke`` without an import.
        OSError: the hostfile can't be read.
    """
    from ascend_envcheck.probes import collect

    if not Path(options.root).is_dir():
        raise EnvcheckError(f"--root {options.root}: there is no such folder")
    if options.smoke and not options.import_seconds:
        raise EnvcheckError("--smoke computes with torch; drop --import_seconds 0")
    peers = _addresses(options.peers) if options.peers is not None else ()
    with progress() as tell:
        return collect(
            root=options.root,
            import_torch=import_torch and options.import_seconds > 0,
            import_seconds=options.import_seconds,
            smoke=options.smoke,
            peers=peers,
            progress=tell,
        )


def _addresses(path: Path) -> tuple[str, ...]:
    """The first word of each line, as in the hostfile of a launcher; ``#`` starts a comment."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    words = [line.partition("#")[0].split()[:1] for line in lines]
    for number, first in enumerate(words, 1):
        if first and not re.fullmatch(r"\w[\w.:%-]*", first[0], re.ASCII):
            raise EnvcheckError(f"{path}:{number}: {first[0]!r} is no address; one a line, as 10.0.0.1")
    return tuple(first[0] for first in words if first)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to below 86400")
    return value
