"""A package's own tests, run as its user has it: a wheel, with what it declares and nothing else, somewhere else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from house.environment import Environment, Recipe
from house.tree import Package, siblings

# Needs a vendor stack of the machine: pip alone cannot make it work.
LEFT_OUT_EXTRAS = ("npu", "cuda")
# What `pip install -e` builds with: once in the environment, where pip would fetch it anew for each package.
BUILD_BACKEND = ("hatchling>=1.27", "editables")

# Files of tests on two processes with one thread each: the numbers of a test are too small for two threads, and two
# processes with two threads on two cores crawl.
SIDE_BY_SIDE = ("-n", "2", "--dist", "loadfile")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def pinned(name: str, constraints: Path) -> str:
    """The line `name==…` of a constraints file; raises `ValueError` when it pins no such thing."""
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}=="):
            return line.partition("#")[0].strip()
    raise ValueError(f"{constraints} does not pin {name}; add a line {name}==VERSION")


def isolation_recipe(
    package: Package, packages: Mapping[str, Package], *, wheels: Path, constraints: Path, tools: Iterable[str]
) -> Recipe:
    """How the environment of `package` is filled: its wheel, all its extras save those of a device, the `tools`.

    Siblings come as wheels from `wheels`, and only when declared.
    """
    wanted = f"{_with_extras(package.name, package)}=={package.version}"
    present = (package, *siblings(package, packages))
    return _recipe(present, ["--find-links", str(wheels), wanted, *tools], constraints)


def everything_recipe(packages: Iterable[Package], *, constraints: Path, tools: Iterable[str]) -> Recipe:
    """How an environment is filled that holds all `packages` in place, extras save a device's, and the `tools`."""
    present = tuple(packages)
    in_place = [part for package in present for part in ("-e", _with_extras(str(package.folder), package))]
    recipe = _recipe(present, ["--no-build-isolation", *in_place, *tools], constraints)
    return replace(recipe, installs=(("-c", str(constraints), *BUILD_BACKEND), *recipe.installs))


def prepare_isolated(
    environment: Environment,
    package: Package,
    packages: Mapping[str, Package],
    *,
    wheels: Path,
    recipe: Recipe,
    lender: Environment | None = None,
) -> None:
    """Bring `environment` up to date: anew when `recipe` changed, else only the fresh wheels in place of the old.

    `lender` is an environment beside it, see `Environment.prepare`.

    Raises:
        CommandError: pip found no way.
    """
    if environment.prepare(recipe, lender=lender):
        return
    ours = [f"{each.name}=={each.version}" for each in (package, *siblings(package, packages))]
    environment.install("--force-reinstall", "--no-deps", "--no-index", "--find-links", str(wheels), *ours)


def run_tests(environment: Environment, package: Package, *, settings: Path, arguments: Sequence[str] = ()) -> None:
    """Run the tests of `package` outside the repository, under the pytest settings of the file `settings`.

    Raises:
        CommandError: a test failed, or an import did.
    """
    with tempfile.TemporaryDirectory(prefix=f"{package.name}-") as elsewhere:
        line: list[str | Path] = ["-m", "pytest", "-c", settings, *SIDE_BY_SIDE, package.tests, *arguments]
        environment.run(*line, cwd=Path(elsewhere), variables=ONE_THREAD)


def _with_extras(what: str, package: Package) -> str:
    extras = ",".join(sorted(set(package.extras) - set(LEFT_OUT_EXTRAS)))
    return f"{what}[{extras}]" if extras else what


def _recipe(present: Iterable[Package], wanted: Sequence[str], constraints: Path) -> Recipe:
    """Install `wanted` under `constraints`; torch, where a package that will be `present` needs it, first and alone.

    The resolver then finds the pinned build in place, instead of weighing the newest one with its CUDA packages. What
    a package declares decides what an environment holds, so a change there makes it out of date.
    """
    limits = ("-c", str(constraints))
    declared = [(requirement.name, str(requirement)) for package in present for requirement in package.requirements()]
    torch_first = [(*limits, pinned("torch", constraints))] if "torch" in dict(declared) else []
    scripts = [script for package in present for script in package.scripts]
    texts = sorted(text for _, text in declared)
    return Recipe(
        installs=(*torch_first, (*limits, *wanted)),
        depends_on=(constraints.read_text(encoding="utf-8"), *texts, *scripts),
    )
