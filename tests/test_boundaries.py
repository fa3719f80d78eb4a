"""The rules of import hold for what is there, and each way of breaking them is seen."""

from pathlib import Path

import pytest

from house.boundaries import ALLOWED, imports_of, violations
from house.planting import Plant
from house.tree import read_packages

PACKAGES = read_packages()


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_keeps_the_rules(name: str) -> None:
    assert violations(PACKAGES[name], PACKAGES) == []


def test_the_rules_name_eight_packages_and_no_circle() -> None:
    assert len(ALLOWED) == 8
    for name, siblings in ALLOWED.items():
        for sibling in siblings:
            assert ALLOWED[sibling] == frozenset(), f"{name} imports {sibling}, which should be a leaf"


@pytest.mark.parametrize(
    "line",
    [
        "import mm_datafmt",
        "import mm_datafmt.formats as formats",
        "from mm_datafmt import read",
        "def lazily():\n    from mm_datafmt.tokens import scan",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mm_datafmt",
        "import importlib\nimportlib.import_module('mm_datafmt.formats')",
        "from importlib import import_module\nimport_module('mm_datafmt')",
        "try:\n    __import__('mm_datafmt')\nexcept ImportError:\n    pass",
    ],
)
def test_a_forbidden_sibling_is_seen_wherever_it_is_imported(plant: Plant, line: str) -> None:
    package = plant("mm-convert", line)
    [found] = violations(package, {package.name: package})
    assert "imports mm_datafmt, a sibling it must not import" in found
    assert found.startswith("mm-convert: __init__.py:")


def test_declaring_a_forbidden_sibling_does_not_allow_it(plant: Plant) -> None:
    datafmt = plant("mm-datafmt")
    package = plant("mm-convert", "import mm_datafmt", dependencies=["mm-datafmt==0.1.0"])
    declared, imported = violations(package, {each.name: each for each in (package, datafmt)})
    assert "declares mm-datafmt, which it must not import" in declared
    assert "a sibling it must not import" in imported


def test_an_allowed_sibling_must_be_declared(plant: Plant) -> None:
    package = plant("mm-finetune", "import mm_convert")
    [found] = violations(package, {package.name: package})
    assert found == "mm-finetune: __init__.py:1 imports mm_convert, but its pyproject.toml lacks mm-convert"


def test_an_allowed_sibling_is_pinned_exactly(plant: Plant) -> None:
    convert = plant("mm-convert")
    package = plant("mm-finetune", "import mm_convert", dependencies=["mm-convert>=0.1"])
    [found] = violations(package, {each.name: each for each in (package, convert)})
    assert "declares mm-convert>=0.1, legal is mm-convert==0.1.0" in found


def test_nobody_imports_ascend_envcheck(plant: Plant) -> None:
    package = plant("mm-finetune", "import ascend_envcheck", dependencies=["ascend-envcheck==0.1.0"])
    assert len(violations(package, {package.name: package})) == 2


def test_ascend_envcheck_declares_nothing(plant: Plant) -> None:
    package = plant("ascend-envcheck", "import rich", dependencies=["rich>=13"])
    [found] = violations(package, {package.name: package})
    assert "must run on the standard library alone" in found


def test_an_undeclared_import_is_seen_in_a_test_too(plant: Plant) -> None:
    package = plant("mm-datafmt", "import json", test="import pytest\nimport numpy\n")
    [found] = violations(package, {package.name: package})
    assert found == "mm-datafmt: test_it.py:2 imports numpy, but its pyproject.toml lacks numpy"


def test_an_import_is_answered_by_a_distribution_of_another_name(plant: Plant) -> None:
    dependencies = ["pillow>=10", "PyYAML>=6", "scikit_learn>=1"]
    package = plant("mm-datafmt", "import PIL.Image, yaml\nfrom sklearn import datasets", dependencies=dependencies)
    assert violations(package, {package.name: package}) == []


def test_an_extra_declares_too(plant: Plant) -> None:
    package = plant("mm-datafmt", "def lazily():\n    import av", extras={"video": ["av>=12"]})
    assert violations(package, {package.name: package}) == []


def test_a_declared_dependency_that_nobody_imports_is_seen(plant: Plant) -> None:
    package = plant("mm-datafmt", dependencies=["orjson>=3", "numpy>=1"])
    [found] = violations(package, {package.name: package})
    assert found == "mm-datafmt: pyproject.toml declares orjson, but no file imports it"


def test_a_package_that_the_design_does_not_know_is_seen(plant: Plant) -> None:
    package = plant("common")
    [found] = violations(package, {package.name: package})
    assert "not one of the eight packages" in found


def test_a_file_beside_a_test_is_no_distribution(plant: Plant) -> None:
    package = plant("mm-datafmt", "from . import formats", test="from worlds import tiny\n")
    (package.tests / "worlds.py").write_text("tiny = 1\n")
    assert violations(package, {package.name: package}) == []


def test_only_literal_absolute_names_count(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text("from . import a\nfrom .b import c\nimport_module('.d', 'e')\nimport_module(name)\nopen('f')\n")
    assert list(imports_of(file)) == []
