"""What the content check says about wheels that hold too little or too much."""

import sys
import zipfile
from pathlib import Path

import pytest

from house import wheels
from house.environment import CommandError, Environment
from house.planting import Plant
from house.tree import ROOT, Package, read_package

THIS = Environment(Path(sys.prefix))


def build(package: Package, target: Path) -> Path:
    wheels.build_wheels([package], target, tools=THIS)
    [wheel] = target.iterdir()
    return wheel


def test_a_good_wheel_has_no_problems_and_replaces_a_stale_one(plant: Plant, tmp_path: Path) -> None:
    package = plant("mm-datafmt")
    target = tmp_path / "wheels"
    target.mkdir()
    (target / "mm_datafmt-0.0.9-py3-none-any.whl").touch()
    assert wheels.wheel_problems(build(package, target), package) == []


def test_the_thin_distribution_holds_metadata_only(tmp_path: Path) -> None:
    meta = read_package(ROOT / "meta")
    wheel = build(meta, tmp_path / "wheels")
    assert wheels.wheel_problems(wheel, meta) == []
    assert {name.partition("/")[0] for name in wheels.wheel_names(wheel)} == {
        f"ascend_multimodal-{meta.version}.dist-info"
    }


def test_what_is_missing_is_named(plant: Plant, tmp_path: Path) -> None:
    package = plant("mm-datafmt", typed=False)
    wheel = build(package, tmp_path / "wheels")
    assert wheels.wheel_problems(wheel, package) == [
        "mm_datafmt-0.1.0-py3-none-any.whl: py.typed is missing, so no type checker looks at the package"
    ]
    empty = tmp_path / "empty.whl"
    zipfile.ZipFile(empty, "w").close()
    assert "empty.whl: the licence is missing" in wheels.wheel_problems(empty, package)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tests/test_it.py", "lies outside mm_datafmt and mm_datafmt-0.1.0.dist-info"),
        ("stray.py", "lies outside"),
        ("mm_datafmt/tests/test_it.py", "is not for users"),
        ("mm_datafmt/__pycache__/x.pyc", "is not for users"),
    ],
)
def test_what_is_too_much_is_named(plant: Plant, tmp_path: Path, name: str, problem: str) -> None:
    package = plant("mm-datafmt")
    wheel = build(package, tmp_path / "wheels")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(name, "")
    [found] = wheels.wheel_problems(wheel, package)
    assert name in found
    assert problem in found


def test_a_heavy_wheel_is_refused(plant: Plant, tmp_path: Path) -> None:
    package = plant("mm-datafmt")
    wheel = build(package, tmp_path / "wheels")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("mm_datafmt/model.bin", bytes(wheels.SIZE_CEILING))
    [found] = wheels.wheel_problems(wheel, package)
    assert "at most 1000000 are allowed" in found


def test_a_package_that_cannot_be_built_stops_the_build(plant: Plant, tmp_path: Path) -> None:
    package = plant("mm-datafmt")
    (package.folder / "LICENSE").unlink()
    (package.folder / "README.md").unlink()
    with pytest.raises(CommandError, match=r"exit code 1: .*build"):
        build(package, tmp_path / "wheels")
