"""Who may import whom: every import and every `pyproject.toml`, held against the rules.

```
applications   mm-finetune -> mm-convert, mm-datafmt      wan-infer -> dit-fused-ops, dit-cache, dit-ulysses
leaves         mm-convert  mm-datafmt  dit-fused-ops  dit-cache  dit-ulysses      (import no sibling)
alone          ascend-envcheck                            (standard library only; imports nobody, nobody imports it)
```

An import counts wherever it stands: inside a function, under `TYPE_CHECKING`, as `import_module("literal")`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from house.tree import Package

ALLOWED: Mapping[str, frozenset[str]] = {
    "ascend-envcheck": frozenset(),
    "mm-convert": frozenset(),
    "mm-datafmt": frozenset(),
    "mm-finetune": frozenset({"mm-convert", "mm-datafmt"}),
    "dit-fused-ops": frozenset(),
    "dit-cache": frozenset(),
    "dit-ulysses": frozenset(),
    "wan-infer": frozenset({"dit-fused-ops", "dit-cache", "dit-ulysses"}),
}
STANDARD_LIBRARY_ONLY = frozenset({"ascend-envcheck"})

# What `nox -s isolated` adds to the declared dependencies, so tests may import it undeclared.
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis")

# Import names that are not the distribution's name with underscores.
DISTRIBUTIONS: Mapping[str, str] = {
    "PIL": "pillow",
    "megatron": "megatron-core",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

# Declared although no file of ours imports it, and why.
NEVER_IMPORTED: Mapping[str, str] = {
    "numpy": "torch and safetensors.torch import it where they exchange bytes, and do not declare it",
    "scikit-image": "mm-finetune opens the photographs that it carries, as files",
    "torch-npu": "registers the operators that dit-fused-ops calls by name; importing it is the user's step",
}

_IMPORTING_CALLS = frozenset({"import_module", "__import__", "importorskip"})


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import of a top-level module, and where it stands."""

    module: str
    place: str


def imports_of(file: Path) -> Iterator[Import]:
    """Every absolute import in `file`, lazy ones and literal `import_module` calls included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        for module in _modules(node):
            yield Import(module=module.partition(".")[0], place=f"{file.name}:{getattr(node, 'lineno', 0)}")


def violations(package: Package, packages: Mapping[str, Package]) -> list[str]:
    """Everything in `package` that the rules forbid, one sentence each; an empty list when it keeps them."""
    return [
        *_forbidden_declarations(package, packages),
        *_undeclared_imports(package),
        *_idle_declarations(package),
    ]


def _modules(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module), level=0):
            yield module
        case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]) if not module.startswith("."):
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in _IMPORTING_CALLS:
                yield module


def _distribution(module: str) -> str:
    return DISTRIBUTIONS.get(module, str(canonicalize_name(module)))


def _foreign_imports(package: Package, folder: Path) -> Iterator[Import]:
    """The imports in `folder` that neither Python nor the package nor a file beside them answers."""
    files = sorted(folder.rglob("*.py"))
    at_home = {package.import_name, *sys.stdlib_module_names}
    if folder == package.tests:
        at_home |= {file.stem for file in files} | {file.parent.name for file in files}
    for file in files:
        yield from (found for found in imports_of(file) if found.module not in at_home)


def _forbidden_declarations(package: Package, packages: Mapping[str, Package]) -> Iterator[str]:
    if package.name not in ALLOWED:
        yield f"{package.name}: not one of the eight packages ({', '.join(ALLOWED)})"
        return
    for requirement in package.requirements():
        name = str(canonicalize_name(requirement.name))
        if name in STANDARD_LIBRARY_ONLY or (name in ALLOWED and name not in ALLOWED[package.name] | {package.name}):
            yield f"{package.name}: its pyproject.toml declares {name}, which it must not import"
        sibling = packages.get(name)
        if sibling is not None and str(requirement.specifier) != f"=={sibling.version}":
            yield f"{package.name}: its pyproject.toml declares {requirement}, legal is {name}=={sibling.version}"
    if package.name in STANDARD_LIBRARY_ONLY and package.dependencies:
        yield f"{package.name}: declares dependencies, but it must run on the standard library alone"


def _undeclared_imports(package: Package) -> Iterator[str]:
    declared = {str(canonicalize_name(requirement.name)) for requirement in package.requirements()}
    for folder, extra in ((package.source, frozenset[str]()), (package.tests, frozenset(TEST_TOOLS))):
        for found in _foreign_imports(package, folder):
            name = _distribution(found.module)
            if name in ALLOWED and name not in ALLOWED.get(package.name, frozenset()):
                yield f"{package.name}: {found.place} imports {found.module}, a sibling it must not import"
            elif name not in declared | extra:
                yield f"{package.name}: {found.place} imports {found.module}, but its pyproject.toml lacks {name}"


def _idle_declarations(package: Package) -> Iterator[str]:
    folders = (package.source, package.tests)
    imported = {_distribution(found.module) for folder in folders for found in _foreign_imports(package, folder)}
    for requirement in package.requirements():
        name = str(canonicalize_name(requirement.name))
        if name not in imported | {package.name} | set(NEVER_IMPORTED):
            yield f"{package.name}: pyproject.toml declares {name}, but no file imports it"
