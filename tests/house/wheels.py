"""Wheels: build them, and look at what they hold."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from house.environment import Environment
from house.tree import Package

BUILD_TOOLS = ("build", "hatchling>=1.27", "twine", "readme_renderer[md]")
SIZE_CEILING = 1_000_000  # bytes
SIZE_CEILINGS = {"wan-infer": 6_000_000}  # it embeds wan-mini


def build_wheels(packages: Iterable[Package], target: Path, *, tools: Environment) -> None:
    """Build the wheel of each package into `target`, which is emptied first: a stale one of this version would win.

    Raises:
        CommandError: a build failed; its output says why.
    """
    shutil.rmtree(target, ignore_errors=True)
    for package in packages:
        tools.run("-m", "build", "--no-isolation", "--wheel", "--outdir", target, package.folder)


def wheel_names(wheel: Path) -> frozenset[str]:
    """The names of the files in `wheel`."""
    with zipfile.ZipFile(wheel) as archive:
        return frozenset(archive.namelist())


def wheel_problems(wheel: Path, package: Package) -> list[str]:
    """What is wrong with the content of `wheel`, one sentence each.

    A wheel holds the import package with its `py.typed`, its metadata and its licence, and nothing else: a `tests`
    folder inside would shadow the user's. A distribution without an import package (the thin one that only depends on
    the others) holds metadata and licence.
    """
    return [f"{wheel.name}: {problem}" for problem in _problems(wheel, package)]


def _problems(wheel: Path, package: Package) -> Iterator[str]:
    names = wheel_names(wheel)
    metadata = f"{package.import_name}-{package.version}.dist-info"
    roots = {metadata}
    if package.source.is_dir():
        roots.add(package.import_name)
        if f"{package.import_name}/py.typed" not in names:
            yield "py.typed is missing, so no type checker looks at the package"
    if f"{metadata}/licenses/LICENSE" not in names:
        yield "the licence is missing"
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if parts[0] not in roots:
            yield f"{name} lies outside {' and '.join(sorted(roots))}"
        elif {"tests", "__pycache__"} & set(parts):
            yield f"{name} is not for users"
    size, ceiling = wheel.stat().st_size, SIZE_CEILINGS.get(package.name, SIZE_CEILING)
    if size > ceiling:
        yield f"{size} bytes, at most {ceiling} are allowed"
