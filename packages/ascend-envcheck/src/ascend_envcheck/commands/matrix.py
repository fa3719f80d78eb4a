"""``matrix``: which versions fit together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Mapping

from ascend_envcheck.commands.facts import read_snapshot
from ascend_envcheck.commands.terminal import add_language, language, progress, show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ascend_envcheck.compat.asked import Asked
    from ascend_envcheck.snapshot import Snapshot

FIXABLE: Mapping[str, str] = {
    "torch": "2.7.1",
    "torch_npu": "2.7.1.post2, or a train, 7.1.0",
    "cann": "8.2.RC1",
    "python": "3.11",
    "hdk": "25.5.0: driver and firmware",
    "mindspeed_mm": "26.0.0",
    "mindie_sd": "3.0.0",
    "soc": "910B2, A3, 310P3: for the names of packages",
    "machine": "x86_64 or aarch64: for the build of torch",
}
"""What may be fixed, with an example."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("matrix", help="tell which versions fit together, and how to install them")
    for name, example in FIXABLE.items():
        parser.add_argument(f"--{name}", default="", metavar="V", help=f"fixed, for instance {example}")
    parser.add_argument("--solve", action="store_true", help="the best set, why, and the steps to install it")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--here", action="store_true", help="what is installed here is fixed, where not given above")
    place.add_argument(
        "--from", type=Path, metavar="FILE", dest="source", help="the same, of the machine of a snapshot"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_language(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the rows, or the best set; 1 when nothing fits."""
    from ascend_envcheck.compat.asked import asked
    from ascend_envcheck.render import matrix

    given = {name: str(getattr(options, name)).strip() for name in FIXABLE}
    fixed = [asked(name, text) for name, text in given.items() if text]
    found, unknown = _found(options)
    fixed += [one for one in found if not given[one.name]]
    text, fits = (matrix.solved if options.solve else matrix.listed)(
        fixed, unknown, as_json=options.json, language=language(options)
    )
    show(text)
    return 0 if fits else 1


def _found(options: argparse.Namespace) -> tuple[list[Asked], list[tuple[str, str]]]:
    """What the machine has fixed, and what it has that the tables don't know."""
    from ascend_envcheck.compat.asked import asked
    from ascend_envcheck.errors import VersionError

    known, unknown = [], []
    for name, text in _installed(options).items():
        try:
            one = asked(name, text)
        except VersionError:
            unknown.append((name, text))
            continue
        if one.values:
            known.append(one)
        else:
            unknown.append((name, text))
    return known, unknown


def _installed(options: argparse.Namespace) -> Mapping[str, str]:
    """The versions of a machine, by the names of `FIXABLE`; nothing without --here and --from."""
    from ascend_envcheck.probes import collect

    if options.source is not None:
        return versions_of(read_snapshot(options.source))
    if not options.here:
        return {}
    with progress() as tell:
        return versions_of(collect(import_torch=False, progress=tell))


def versions_of(snapshot: Snapshot) -> Mapping[str, str]:
    """What a snapshot tells about the things that `solve` can fix; no more than it tells."""
    from ascend_envcheck.rules.cann import active_version
    from ascend_envcheck.rules.npu import soc

    names = {
        "torch": "torch",
        "torch_npu": "torch_npu",
        "mindspeed_mm": "mindspeed-mm",
        "mindie_sd": "mindiesd",
    }
    installed = {
        name: snapshot.distributions[package].version
        for name, package in names.items()
        if package in snapshot.distributions
    }
    found = {
        **installed,
        "cann": active_version(snapshot) or "",
        "python": snapshot.python.version,
        "hdk": _driver_version(snapshot),
        "machine": snapshot.python.machine,
        "soc": soc(snapshot) or "",
    }
    return {name: text for name, text in found.items() if text}


def _driver_version(snapshot: Snapshot) -> str:
    """The version of the driver by its own file: of the package, as HDKs are numbered, else the internal one."""
    from ascend_envcheck.versions import pairs

    for path, text in snapshot.files.items():
        if path.endswith("/driver/version.info"):
            told = pairs(text)
            return told.get("package_version") or told.get("version", "")
    return ""
