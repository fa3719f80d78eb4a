"""One version for everything: distributions, pins between them, changelogs, documentation."""

import re

import pytest

from house.tree import ROOT, Package, read_package, read_packages

PACKAGES = read_packages()
META = read_package(ROOT / "meta")
ALL = [*PACKAGES.values(), META]


@pytest.mark.parametrize("package", ALL, ids=lambda package: str(package.name))
def test_the_version_is_the_common_one(package: Package) -> None:
    assert package.version == META.version


@pytest.mark.parametrize("package", ALL, ids=lambda package: str(package.name))
def test_siblings_are_pinned_to_the_common_version(package: Package) -> None:
    pins = {each.name: str(each.specifier) for each in package.requirements() if each.name in PACKAGES}
    assert set(pins.values()) <= {f"=={META.version}"}, pins


@pytest.mark.parametrize("package", ALL, ids=lambda package: str(package.name))
def test_the_changelog_opens_with_the_version(package: Package) -> None:
    changelog = (package.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[?([^\s\]]+)", changelog, flags=re.MULTILINE)
    assert headings[:1] == [META.version]


def test_the_thin_distribution_depends_on_every_package() -> None:
    assert {each.name for each in META.dependencies} == set(PACKAGES)


def test_the_thin_distribution_forwards_every_npu_extra() -> None:
    forwarded = {(each.name, *each.extras) for each in META.extras["npu"] if each.name in PACKAGES}
    assert forwarded == {(package.name, "npu") for package in PACKAGES.values() if "npu" in package.extras}


def test_the_documentation_names_the_version() -> None:
    assert f'release = "{META.version}"' in (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
