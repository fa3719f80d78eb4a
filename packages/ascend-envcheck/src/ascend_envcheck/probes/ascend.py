"""Driver, firmware, CANN and NNAL as files: where they lie, and what their version files say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Mapping

from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.versions import pairs

LIBRARIES = ("libascendcl.so", "libatb.so")
MANAGERS = ("davinci_manager", "devmm_svm", "hisi_hdc")
INSTALL_INFO = "/etc/ascend_install.info"
NNAL = "/usr/local/Ascend/nnal/atb"

# Beneath a CANN home: 8.5 and newer keep version.info in share/info, older ones beside each package.
_CANN_FILES = (
    "aarch64-linux/ascend_toolkit_install.info",
    "x86_64-linux/ascend_toolkit_install.info",
    "share/info/runtime/version.info",
    "runtime/version.info",
    "compiler/version.info",
    "version.cfg",
)


@dataclass(frozen=True)
class Layout:
    """The parts of a `Snapshot` that come from the file system."""

    devices: dict[str, str]
    cann_homes: tuple[str, ...]
    files: dict[str, str]
    paths: dict[str, str]
    libraries: dict[str, str]


def look(tree: Tree, environ: Mapping[str, str]) -> Layout:
    """Everything of Ascend that lies in files."""
    homes = _cann_homes(tree, environ)
    folders = [entry for entry in environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    wanted = [INSTALL_INFO, *_driver_files(tree, environ)]
    wanted += [f"{home}/{name}" for home in homes for name in _CANN_FILES]
    present = [*homes, *folders, *wanted, NNAL, f"{NNAL}/set_env.sh", environ.get("ATB_HOME_PATH", "")]
    for home in homes:
        present += [f"{home}/set_env.sh", _beside(home, "set_env.sh")]
    return Layout(
        devices=_devices(tree),
        cann_homes=homes,
        files={path: text for path, text in ((path, tree.text(path)) for path in wanted) if text is not None},
        paths={path: target for path, target in ((path, tree.resolve(path)) for path in present) if target},
        libraries=_libraries(tree, folders),
    )


def cann_candidates(environ: Mapping[str, str]) -> list[str]:
    """Where CANN may be: the variables first, which win, then the places of its installers."""
    named = [environ.get("ASCEND_HOME_PATH", ""), environ.get("ASCEND_TOOLKIT_HOME", "")]
    roots = ["/usr/local/Ascend"]
    if environ.get("HOME", "").startswith("/"):
        roots.append(environ["HOME"].rstrip("/") + "/Ascend")
    usual = [f"{root}/{name}" for root in roots for name in ("cann", "ascend-toolkit/latest")]
    return [path.rstrip("/") for path in [*named, *usual] if path.rstrip("/")]


def _cann_homes(tree: Tree, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The candidates that exist, each real folder once."""
    found: dict[str, str] = {}
    for path in cann_candidates(environ):
        target = tree.resolve(path)
        if target is not None:
            found.setdefault(target, path)
    return tuple(found.values())


def _driver_files(tree: Tree, environ: Mapping[str, str]) -> list[str]:
    named = pairs(tree.text(INSTALL_INFO) or "").get("driver_install_path_param", "")
    roots = [named, environ.get("ASCEND_DRIVER_PATH", ""), "/usr/local/Ascend", "/usr/local/npu"]
    return [f"{root}/{part}/version.info" for root in roots if root for part in ("driver", "firmware")]


def _devices(tree: Tree) -> dict[str, str]:
    names = [name for name in tree.names("/dev") if re.fullmatch(r"davinci\d+", name) or name in MANAGERS]
    return {f"/dev/{name}": "rw" if tree.may_use(f"/dev/{name}") else "denied" for name in names}


def _libraries(tree: Tree, folders: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for folder in folders:
        for name in LIBRARIES:
            if tree.resolve(f"{folder}/{name}") is not None:
                found.setdefault(name, folder)
    return found


def _beside(path: str, name: str) -> str:
    return path.rsplit("/", 1)[0] + "/" + name
