"""Stub CANN libraries: with them on the loader's path the real torch_npu wheel imports on a machine without CANN.

`python stub_cann.py` builds them for the torch_npu that is installed beside this Python and prints their folder. What
stands on them is real (operator names, schemas, the vendor's shape functions), what lies below is not: a stub returns
0, so that nothing may be executed on an `npu` tensor that is not fake.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

TOOLS = ("gcc", "nm", "readelf")
VENDOR = ("torch_npu", "mindiesd")  # whose libraries want CANN; the second is optional
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stub-cann"

# Runtimes of compiler and interpreter resolve these themselves; a stub of one of them would break exceptions.
NOT_STUBBED = re.compile(r"_?Py|_ITM|__gmon|__cxa_|__tls|_ZTH|_ZTI|_ZTV|_ZTS")
# Functions that torch_npu looks up by name at run time are found as text in its libraries.
LOOKED_UP = re.compile(rb"(?<![A-Za-z0-9_])(?:acl|Hccl|Msprof|Adx|rt[A-Z])[A-Za-z0-9_]{2,}(?=\0)")

ALLOCATES = ("aclrtMalloc", "aclrtMallocHost", "aclrtMallocAlign32", "aclrtMallocWithCfg")
FREES = ("aclrtFree", "aclrtFreeHost")
CREATES = (
    "aclrtCreateStream",
    "aclrtCreateStreamWithConfig",
    "aclrtCreateStreamV2",
    "aclrtCreateEvent",
    "aclrtCreateEventWithFlag",
    "aclrtCreateEventExWithFlag",
    "aclrtCreateContext",
    "aclrtGetCurrentContext",
)
# What must do more than return 0: one device, its name, its memory, and handles that are not null.
BODIES: dict[str, str] = {
    "aclrtGetDeviceCount": "int {name}(unsigned *count) {{ *count = 1; return 0; }}",
    "aclrtGetDevice": "int {name}(int *device) {{ *device = 0; return 0; }}",
    "aclrtGetSocName": 'const char *{name}(void) {{ return "Ascend910B1"; }}',
    "aclGetCompileoptSize": "unsigned long {name}(int option) {{ return 8; }}",
    "aclGetCompileopt": 'int {name}(int o, char *value, unsigned long n) {{ strncpy(value, "enable", n); return 0; }}',
    "aclGetRecentErrMsg": 'const char *{name}(void) {{ return "stub"; }}',
    "aclrtGetMemInfo": (
        "int {name}(int kind, unsigned long *free, unsigned long *total)"
        " {{ *free = 60UL << 30; *total = 64UL << 30; return 0; }}"
    ),
    **dict.fromkeys(ALLOCATES, "int {name}(void **p, unsigned long n, ...) {{ *p = malloc(n ? n : 1); return 0; }}"),
    **dict.fromkeys(CREATES, "int {name}(void **handle, ...) {{ *handle = malloc(64); return 0; }}"),
    **dict.fromkeys(FREES, "int {name}(void *p) {{ free(p); return 0; }}"),
}
RETURNS_ZERO = "long long {name}() {{ return 0; }}"


class StubError(RuntimeError):
    """The stub cannot be built; the message says what is missing."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StubError(f"`{' '.join(command[:3])} …` ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _require_tools() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise StubError(f"not on PATH: {', '.join(missing)}. Install the system's C compiler and binutils.")


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise StubError(f"{name} is not installed for {sys.executable}. Install torch and the torch_npu of its minor.")
    return Path(spec.origin).parent


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _libraries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.so*") if path.is_file())


def _vendor_libraries(packages: Mapping[str, Path]) -> list[Path]:
    # mindiesd carries operators for CANN's own loader too; Python loads the plugin alone.
    folders = (folder / "plugin" if name == "mindiesd" else folder for name, folder in packages.items())
    return [library for folder in folders for library in _libraries(folder)]


def _symbols(library: Path, which: str) -> set[str]:
    lines = _run("nm", "-D", which, str(library)).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.split()}


def _needed(libraries: Iterable[Path]) -> set[str]:
    found = (re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-d", str(library))) for library in libraries)
    return {name for names in found for name in names}


def _system_library(name: str) -> Path | None:
    """Where the compiler finds the shared library `name`; None when the system has none of that name."""
    path = Path(_run("gcc", f"-print-file-name={name}").strip())
    return path if path.is_absolute() else None


def _source(names: Iterable[str]) -> str:
    bodies = (BODIES.get(name, RETURNS_ZERO).format(name=name) for name in sorted({*names, *BODIES}))
    return "\n".join(("#include <stdlib.h>", "#include <string.h>", *bodies, ""))


def plan(vendor: Iterable[Path], provided: Iterable[Path]) -> tuple[list[str], str]:
    """Which libraries the `vendor` ones miss, and the C source that holds everything missing.

    Every stub library holds every symbol: which one the vendor takes a function from is then of no matter.
    """
    vendor, provided = list(vendor), list(provided)
    present = {library.name for library in (*vendor, *provided)}
    absent = _needed(vendor) - present
    system = {name: _system_library(name) for name in absent}
    have = [*vendor, *provided, *(path for path in system.values() if path)]
    defined = set().union(*(_symbols(library, "--defined-only") for library in have))
    undefined = set().union(*(_symbols(library, "--undefined-only") for library in vendor))
    looked_up = {match.decode() for library in vendor for match in LOOKED_UP.findall(library.read_bytes())}
    wanted = {name for name in (undefined | looked_up) - defined if not NOT_STUBBED.match(name)}
    return sorted(name for name, path in system.items() if path is None), _source(wanted)


def _compile(folder: Path, names: Iterable[str], source: str) -> None:
    (folder / "stub.c").write_text(source, encoding="utf-8")
    code = folder / "stub.o"
    _run("gcc", "-c", "-fPIC", "-w", "-fno-builtin", str(folder / "stub.c"), "-o", str(code))
    for name in names:
        _run("gcc", "-shared", str(code), f"-Wl,-soname,{name}", "-o", str(folder / name))
    code.unlink()


def _digest(packages: Mapping[str, Path]) -> str:
    versions = (metadata.version(name) for name in packages)
    parts = (Path(__file__).read_text(encoding="utf-8"), sysconfig.get_platform(), sys.version, *versions)
    return hashlib.sha256("\0".join((*parts, *map(str, packages.values()))).encode()).hexdigest()[:16]


def build(cache: Path = CACHE) -> Path:
    """Build the stub for the installed torch_npu (and mindiesd, where it is), or find the one built before; its folder.

    The folder is named by a digest of their versions and of this file, filled under another name and renamed when
    complete: any number of processes may build at once, an interrupted one leaves nothing that looks finished.

    Raises:
        StubError: a tool or a package is missing, or the compiler refuses.
    """
    _require_tools()
    torch = _package_folder("torch")
    vendor = {name: _package_folder(name) for name in VENDOR if name == "torch_npu" or _installed(name)}
    folder = cache / _digest({"torch": torch, **vendor})
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        names, source = plan(_vendor_libraries(vendor), _libraries(torch))
        _compile(building, names, source)
        (building / "opp").mkdir()
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _publish(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, with the same content
            raise


def environment(folder: Path, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a Python needs from its start to import torch_npu on the stub in `folder`."""
    paths = (str(folder), *filter(None, [inherited.get("LD_LIBRARY_PATH")]))
    return {"LD_LIBRARY_PATH": os.pathsep.join(paths), "ASCEND_OPP_PATH": str(folder / "opp")}


def main(arguments: list[str] | None = None) -> int:
    """Print the folder of the stub, or with --env the variables as lines of a shell; 2 with a message on failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where stubs are kept (default: %(default)s)")
    parser.add_argument("--env", action="store_true", help="print NAME=VALUE lines instead of the folder")
    chosen = parser.parse_args(arguments)
    try:
        folder = build(chosen.cache)
    except StubError as error:
        print(f"stub_cann: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name}={value}" for name, value in environment(folder).items()) if chosen.env else folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
