"""Tiny packages planted in a temporary folder, to see the checks of the house turn red."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from house.tree import ROOT, Package, read_package

Plant = Callable[..., Package]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """A function that writes `packages/<name>` below `tmp_path` and returns what was written.

    It takes the name, the text of `__init__.py`, the declared dependencies, the extras and the text of a test file.
    """

    def write(
        name: str,
        source: str = "",
        *,
        dependencies: Sequence[str] = (),
        extras: Mapping[str, Sequence[str]] | None = None,
        test: str = "",
        typed: bool = True,
    ) -> Package:
        folder = tmp_path / "packages" / name
        module = folder / "src" / name.replace("-", "_")
        for made in (module, folder / "tests"):
            made.mkdir(parents=True, exist_ok=True)
        (folder / "pyproject.toml").write_text(_pyproject(name, module.name, dependencies, extras or {}))
        (folder / "README.md").write_text(f"# {name}\n")
        (folder / "LICENSE").write_text((ROOT / "LICENSE").read_text())
        (module / "__init__.py").write_text(source)
        (folder / "tests" / "test_it.py").write_text(test)
        if typed:
            (module / "py.typed").touch()
        return read_package(folder)

    return write


def _pyproject(name: str, module: str, dependencies: Sequence[str], extras: Mapping[str, Sequence[str]]) -> str:
    # JSON's strings and lists of strings are TOML's.
    return f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{name}"
version = "0.1.0"
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.10"
dependencies = {json.dumps(list(dependencies))}
[project.optional-dependencies]
{"".join(f"{extra} = {json.dumps(list(needed))}" for extra, needed in extras.items())}
[tool.hatch.build.targets.wheel]
packages = ["src/{module}"]
"""
