"""`nox -s isolated` is red for what a source tree hides: tried with the session's own functions on planted packages."""

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from house.environment import CommandError, Environment, Recipe
from house.isolation import everything_recipe, isolation_recipe, pinned, prepare_isolated, run_tests
from house.planting import Plant
from house.tree import ROOT, Package, siblings
from house.wheels import build_wheels

THIS = Environment(Path(sys.prefix))
TEST = "import mm_finetune\n\ndef test_it():\n    assert mm_finetune.ANSWER == 42\n"
SIBLING = "ANSWER = 42\n"
PREFIX = "def main():\n    import sys\n    print(sys.prefix)\n"
PYTEST = ("pytest", "pytest-xdist", "execnet", "pluggy", "iniconfig", "packaging", "pygments")


@pytest.fixture
def constraints(tmp_path: Path) -> Path:
    file = tmp_path / "cpu.txt"
    file.write_text("torch==2.13.0 # the CPU build\n")
    return file


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "env")


def bring_up_to_date(
    environment: Environment, package: Package, packages: Iterable[Package], constraints: Path
) -> None:
    """What the session does before the tests, save that pytest comes without an index: copied from here."""
    known = {each.name: each for each in packages}
    wheels = environment.path.parent / "wheels"
    build_wheels(known.values(), wheels, tools=THIS)
    recipe = isolation_recipe(package, known, wheels=wheels, constraints=constraints, tools=["--no-index"])
    prepare_isolated(environment, package, known, wheels=wheels, recipe=recipe)
    [site_packages] = environment.path.glob("lib/python*/site-packages")
    for file in (file for name in PYTEST for file in importlib.metadata.files(name) or ()):
        if ".." not in file.parts:
            target = site_packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.locate(), target)


def test_green_red_green(
    plant: Plant,
    environment: Environment,
    constraints: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One environment through four states of a package, as an author's work goes."""
    sibling = plant("mm-convert", SIBLING)
    package = plant("mm-finetune", SIBLING, test=TEST)
    monkeypatch.setenv("PYTHONPATH", str(sibling.source.parent))
    monkeypatch.chdir(package.source.parent)

    bring_up_to_date(environment, package, (package, sibling), constraints)
    run_tests(environment, package, settings=ROOT / "pyproject.toml")

    # The sibling is imported, but not declared. It lies on PYTHONPATH, and its wheel beside ours: that helps nobody.
    package = plant("mm-finetune", "from mm_convert import ANSWER\n", test=TEST)
    bring_up_to_date(environment, package, (package, sibling), constraints)
    capfd.readouterr()
    with pytest.raises(CommandError, match="exit code"):
        run_tests(environment, package, settings=ROOT / "pyproject.toml")
    assert "No module named 'mm_convert'" in capfd.readouterr().out

    package = plant("mm-finetune", "from mm_convert import ANSWER\n", dependencies=["mm-convert==0.1.0"], test=TEST)
    bring_up_to_date(environment, package, (package, sibling), constraints)
    run_tests(environment, package, settings=ROOT / "pyproject.toml")

    # No longer declared: the environment must forget the sibling that it held.
    package = plant("mm-finetune", "from mm_convert import ANSWER\n", test=TEST)
    bring_up_to_date(environment, package, (package, sibling), constraints)
    with pytest.raises(CommandError, match="exit code"):
        run_tests(environment, package, settings=ROOT / "pyproject.toml")


def test_a_warning_in_an_isolated_test_is_an_error(plant: Plant, environment: Environment, constraints: Path) -> None:
    """The settings of the root are in force, although the package is elsewhere and pytest runs elsewhere."""
    test = "import warnings\n\ndef test_it():\n    warnings.warn('planted', stacklevel=1)\n"
    package = plant("mm-datafmt", test=test)
    bring_up_to_date(environment, package, [package], constraints)
    with pytest.raises(CommandError, match="exit code 1"):
        run_tests(environment, package, settings=ROOT / "pyproject.toml")


def test_the_recipe_brings_extras_but_not_npu_and_torch_first_only_where_it_is_needed(
    plant: Plant, constraints: Path, tmp_path: Path
) -> None:
    leaf = plant("mm-datafmt", dependencies=["pillow>=10"], extras={"npu": ["torch-npu>=2.7"]})
    heavy = plant("mm-convert", dependencies=["torch>=2.6"])
    app = plant("mm-finetune", dependencies=["mm-convert==0.1.0"], extras={"demo": ["matplotlib>=3"]})
    packages = {each.name: each for each in (leaf, heavy, app)}

    def installs(package: Package) -> tuple[tuple[str, ...], ...]:
        recipe = isolation_recipe(package, packages, wheels=tmp_path, constraints=constraints, tools=["pytest"])
        return recipe.installs

    limits, links = ("-c", str(constraints)), ("--find-links", str(tmp_path))
    assert installs(leaf) == ((*limits, *links, "mm-datafmt==0.1.0", "pytest"),)
    assert installs(app) == (
        (*limits, "torch==2.13.0"),
        (*limits, *links, "mm-finetune[demo]==0.1.0", "pytest"),
    )
    everything = everything_recipe([leaf, app], constraints=constraints, tools=["pytest"])
    in_place = ("--no-build-isolation", "-e", str(leaf.folder), "-e", f"{app.folder}[demo]", "pytest")
    assert everything.installs == ((*limits, "hatchling>=1.27", "editables"), (*limits, *in_place))


def test_an_environment_is_out_of_date_when_a_sibling_declares_more(
    plant: Plant, constraints: Path, tmp_path: Path
) -> None:
    def digest() -> str:
        recipe = isolation_recipe(app, packages, wheels=tmp_path, constraints=constraints, tools=[])
        return recipe.digest

    app = plant("mm-finetune", dependencies=["mm-convert==0.1.0"])
    packages = {each.name: each for each in (app, plant("mm-convert"))}
    before = digest()
    assert before == digest()
    packages["mm-convert"] = plant("mm-convert", dependencies=["safetensors>=0.5"])
    assert digest() != before
    before = digest()
    constraints.write_text("torch==2.14.0\n")
    assert digest() != before


def test_an_interrupted_making_is_made_again(environment: Environment) -> None:
    assert environment.prepare(Recipe(installs=()))
    with pytest.raises(CommandError, match="no-such-folder"):
        environment.prepare(Recipe(installs=(("--no-index", "./no-such-folder"),)))
    assert environment.prepare(Recipe(installs=()))
    assert not environment.prepare(Recipe(installs=()))


def test_an_environment_that_borrowed_holds_what_pip_alone_would_have_brought(plant: Plant, tmp_path: Path) -> None:
    """The lender holds what is wanted, an older version of it, a thing from a path, and a thing that nobody wants."""
    wheels = tmp_path / "wheels"
    datafmt, convert, app = plant("mm-datafmt"), plant("mm-convert", PREFIX), plant("mm-finetune")
    with (convert.folder / "pyproject.toml").open("a") as pyproject:
        pyproject.write('[project.scripts]\nmm-convert = "mm_convert:main"\n')
    build_wheels([datafmt, convert, app, plant("dit-cache")], wheels, tools=THIS)
    offline = ("--no-index", "--find-links", str(wheels))
    from_path = str(wheels / "mm_finetune-0.1.0-py3-none-any.whl")
    lender, alone, borrower = (Environment(tmp_path / name) for name in ("lender", "alone", "borrower"))
    lender.prepare(Recipe(installs=((*offline, "mm-datafmt", "mm-convert", "dit-cache", from_path),)))

    newer = datafmt.folder / "pyproject.toml"
    newer.write_text(newer.read_text().replace('version = "0.1.0"', 'version = "0.2.0"'))
    build_wheels([datafmt, convert, app], wheels, tools=THIS)
    recipe = Recipe(installs=((*offline, "mm-datafmt", "mm-convert", "mm-finetune"),))
    finished = lender.seal.rename(tmp_path / "seal")
    alone.prepare(recipe, lender=lender)  # in the making, it lends nothing
    finished.rename(lender.seal)
    borrower.prepare(recipe, lender=lender)

    assert files(borrower) == files(alone)
    lent = {name: shared(name, lender, borrower) for name in ("mm_convert", "mm_datafmt", "mm_finetune")}
    assert lent == {"mm_convert": True, "mm_datafmt": False, "mm_finetune": False}
    assert not shared("mm_convert", lender, alone)
    script = subprocess.run([borrower.command("mm-convert")], check=True, capture_output=True, text=True)
    assert script.stdout.strip() == str(borrower.path)


def files(environment: Environment) -> set[Path]:
    return {path.relative_to(environment.path) for path in environment.path.rglob("*") if path.is_file()}


def shared(name: str, *environments: Environment) -> bool:
    first, second = (next(each.path.glob(f"lib/python*/site-packages/{name}/__init__.py")) for each in environments)
    return first.samefile(second)


def test_siblings_are_followed_through_siblings(plant: Plant) -> None:
    leaf = plant("dit-cache")
    middle = plant("dit-ulysses", dependencies=["dit-cache==0.1.0"])
    app = plant("wan-infer", dependencies=["torch>=2.6"], extras={"many": ["DIT_ulysses==0.1.0"]})
    assert siblings(app, {each.name: each for each in (app, middle, leaf)}) == (leaf, middle)


def test_torch_must_be_pinned(constraints: Path) -> None:
    assert pinned("torch", constraints) == "torch==2.13.0"
    with pytest.raises(ValueError, match=r"does not pin numpy; add a line numpy==VERSION"):
        pinned("numpy", constraints)
