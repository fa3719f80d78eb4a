"""CANN and NNAL: where they lie, what their version files say, and whether the loader can load their libraries."""

from __future__ import annotations

from typing import Iterable, Mapping, Sequence

from ascend_envcheck.probes.place import Facts, Place
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.snapshot import CRASHED, FAILED, NOT_RUN, OK, TIMEOUT, CommandFacts

LIBRARIES = ("libascendcl.so", "libhccl.so", "libruntime.so", "libge_runner.so", "libatb.so", "libascend_hal.so")
NNAL = "/usr/local/Ascend/nnal/atb"
KERNELS = "built-in/op_impl/ai_core/tbe/kernel/config"
"""Beneath a folder of operators (opp): one folder a SoC for which compiled kernels are installed."""

_ARCHES = ("aarch64-linux", "x86_64-linux")
# Beneath a CANN home: 8.5 and newer keep version.info in share/info, older ones beside each package.
_CANN_FILES = (
    *(f"{arch}/ascend_{package}_install.info" for arch in _ARCHES for package in ("toolkit", "ops")),
    "share/info/runtime/version.info",
    "share/info/opp_kernel/version.info",
    "runtime/version.info",
    "compiler/version.info",
    "opp_kernel/version.info",
    "version.cfg",
)
_LIBRARY_FOLDERS = ("/lib64", "/devlib", *(f"/{arch}/{name}" for arch in _ARCHES for name in ("lib64", "devlib")))

# One line for each library, told before and after it is loaded, so that one that ends the process is known.
# ctypes.CDLL binds all symbols at once, which real programs do not ask for; dlopen itself binds them when used.
_CHILD = """
import ctypes, sys
here = ctypes.CDLL(None)
here.dlopen.restype = ctypes.c_void_p
here.dlerror.restype = ctypes.c_char_p
for name in sys.argv[1:]:
    print("try " + name, flush=True)
    if here.dlopen(name.encode(), 1):
        print("ok " + name, flush=True)
    else:
        print("no " + " ".join((here.dlerror() or b"").decode("utf-8", "replace").split()), flush=True)
"""


def look(place: Place) -> Facts:
    """Everything of CANN and NNAL that lies in files, and the outcome of loading their libraries."""
    tree, environ = place.tree, place.environ
    entries = _entries(environ)
    libraries = _libraries(tree, _split(environ.get("LD_LIBRARY_PATH", "")))
    homes = _homes(tree, environ, libraries.get("libascendcl.so", ()))
    nnal = _nnal_homes(environ)
    wanted = [*(f"{home}/{name}" for home in homes for name in _CANN_FILES), *_nnal_files(environ, nnal)]
    present = [*homes, *entries, *wanted, *nnal, *(f"{home}/set_env.sh" for home in nnal)]
    present += [environ.get("ATB_HOME_PATH", ""), *(script for home in homes for script in set_env_scripts(home))]
    present += [f"{folder}/{name}" for name, folders in libraries.items() for folder in folders]
    operators = list(
        dict.fromkeys([environ.get("ASCEND_OPP_PATH", "").rstrip("/"), *(f"{home}/opp" for home in homes)])
    )
    present += [f"{folder}{part}" for folder in operators if folder for part in ("", "/built-in")]
    kernels = {f"{folder}/{KERNELS}": tree.names(f"{folder}/{KERNELS}") for folder in operators if folder}
    return {
        "cann_homes": homes,
        "files": {path: text for path, text in ((path, tree.text(path)) for path in wanted) if text is not None},
        "paths": {path: target for path, target in ((path, tree.resolve(path)) for path in present) if target},
        "folders": {path: names for path, names in kernels.items() if tree.resolve(path)},
        "libraries": libraries,
        "loads": load(LIBRARIES, environ, place.command_seconds) if place.live and homes else {},
    }


def set_env_scripts(home: str) -> tuple[str, ...]:
    """Where the set_env.sh of a CANN home may be: in it (8.5 and newer) or beside it (older)."""
    return f"{home}/set_env.sh", home.rpartition("/")[0] + "/set_env.sh"


def candidates(environ: Mapping[str, str], with_libascendcl: Sequence[str] = ()) -> list[str]:
    """Where CANN may be: the variables first, which win, then the loader's path, then the places of its installers."""
    named = [environ.get("ASCEND_HOME_PATH", ""), environ.get("ASCEND_TOOLKIT_HOME", "")]
    ends = sorted(_LIBRARY_FOLDERS, key=len, reverse=True)
    holders = [next((folder[: -len(end)] for end in ends if folder.endswith(end)), "") for folder in with_libascendcl]
    usual = [f"{root}/{name}" for root in _roots(environ) for name in ("cann", "ascend-toolkit/latest")]
    return [path.rstrip("/") for path in [*named, *holders, *usual] if path.rstrip("/")]


def load(names: Iterable[str], environ: Mapping[str, str], seconds: float) -> dict[str, CommandFacts]:
    """Loads libraries by name, as the loader finds them, in one child process."""
    import sys

    from ascend_envcheck.probes.command import run

    names = list(names)
    outcome, detail, out, _ = run([sys.executable, "-c", _CHILD, *names], environ, seconds=seconds)
    found: dict[str, CommandFacts] = {}
    current = ""
    for line in out.splitlines():
        word, _, rest = line.partition(" ")
        if word == "try":
            current = rest
            found[current] = CommandFacts(outcome if outcome in (CRASHED, TIMEOUT) else FAILED, detail)
        elif word in ("ok", "no") and current:
            found[current] = CommandFacts(OK) if word == "ok" else CommandFacts(FAILED, rest[:300])
    return {name: found.get(name, CommandFacts(NOT_RUN, detail)) for name in names}


def _homes(tree: Tree, environ: Mapping[str, str], with_libascendcl: Sequence[str]) -> tuple[str, ...]:
    """The candidates that exist, each real folder once."""
    found: dict[str, str] = {}
    for path in candidates(environ, with_libascendcl):
        target = tree.resolve(path)
        if target is not None:
            found.setdefault(target, path)
    return tuple(found.values())


def _roots(environ: Mapping[str, str]) -> list[str]:
    home = environ.get("HOME", "")
    return ["/usr/local/Ascend", *([home.rstrip("/") + "/Ascend"] if home.startswith("/") else [])]


def _nnal_homes(environ: Mapping[str, str]) -> list[str]:
    return [f"{root}/nnal/atb" for root in _roots(environ)]


def _nnal_files(environ: Mapping[str, str], homes: Sequence[str]) -> list[str]:
    """ATB_HOME_PATH is ``nnal/atb/VERSION/atb/cxx_abi_1``; version.info lies two folders above it."""
    active = environ.get("ATB_HOME_PATH", "").rstrip("/")
    above = active.rsplit("/", 2)[0] if active.count("/") > 2 else ""
    return [f"{folder}/version.info" for folder in (above, *(f"{home}/latest" for home in homes)) if folder]


def _entries(environ: Mapping[str, str]) -> list[str]:
    """The folders of the search paths that set_env.sh extends; of PATH and PYTHONPATH the vendor's only."""
    others = (entry for name in ("PATH", "PYTHONPATH") for entry in _split(environ.get(name, "")))
    return [*_split(environ.get("LD_LIBRARY_PATH", "")), *(entry for entry in others if is_of_ascend(entry))]


def is_of_ascend(folder: str) -> bool:
    """Whether a folder is named like one of the vendor's."""
    return any(word in folder.lower() for word in ("ascend", "cann", "nnal"))


def _split(path: str) -> list[str]:
    return [entry for entry in path.split(":") if entry]


def _libraries(tree: Tree, folders: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found = {name: tuple(f for f in folders if tree.resolve(f"{f}/{name}") is not None) for name in LIBRARIES}
    return {name: having for name, having in found.items() if having}
