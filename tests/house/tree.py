"""The packages of the repository, read from their `pyproject.toml` files; no code of theirs is run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Package:
    """One distribution: its folder and what its `pyproject.toml` says."""

    name: str
    version: str
    folder: Path
    dependencies: tuple[Requirement, ...]
    extras: Mapping[str, tuple[Requirement, ...]]
    scripts: tuple[str, ...]

    @property
    def import_name(self) -> str:
        """The name of the import package: the distribution's, with underscores."""
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        """The folder of the import package."""
        return self.folder / "src" / self.import_name

    @property
    def tests(self) -> Path:
        """The folder of the package's own tests."""
        return self.folder / "tests"

    def requirements(self, *, leave_out: Iterable[str] = ()) -> tuple[Requirement, ...]:
        """Every declared requirement, those of the extras included, save the extras named in `leave_out`."""
        left_out = set(leave_out)
        extras = [needed for extra, needed in self.extras.items() if extra not in left_out]
        return (*self.dependencies, *(requirement for needed in extras for requirement in needed))


def read_package(folder: Path) -> Package:
    """Read the package in `folder`.

    Raises:
        OSError: there is no `pyproject.toml`.
        KeyError: it lacks a `[project]` table with a name and a version.
    """
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    return Package(
        name=project["name"],
        version=project["version"],
        folder=folder,
        dependencies=_requirements(project.get("dependencies", [])),
        extras={extra: _requirements(texts) for extra, texts in extras.items()},
        scripts=tuple(project.get("scripts", {})),
    )


def read_packages(root: Path = ROOT) -> dict[str, Package]:
    """Every package under `root/packages`, by name, in alphabetical order."""
    folders = sorted(path.parent for path in root.glob("packages/*/pyproject.toml"))
    return {package.name: package for package in map(read_package, folders)}


def siblings(package: Package, packages: Mapping[str, Package]) -> tuple[Package, ...]:
    """The packages of ours that `package` declares, directly or through another of ours, in alphabetical order."""
    found: dict[str, Package] = {}
    waiting = [package]
    while waiting:
        for requirement in waiting.pop().requirements():
            sibling = packages.get(canonicalize_name(requirement.name))
            if sibling is not None and sibling.name not in (*found, package.name):
                found[sibling.name] = sibling
                waiting.append(sibling)
    return tuple(found[name] for name in sorted(found))


def _requirements(texts: Iterable[str]) -> tuple[Requirement, ...]:
    return tuple(Requirement(text) for text in texts)
