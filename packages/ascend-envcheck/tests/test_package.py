"""What the package promises of itself: the standard library only, Python 3.8, a light import, a true manual."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ascend_envcheck
from ascend_envcheck import errors
from ascend_envcheck.commands import COMMANDS
from ascend_envcheck.messages import CHINESE, Message, told
from ascend_envcheck.rules.packs import read_pack
from ascend_envcheck.rules.rule import GROUPS
from ascend_envcheck.snapshot import Distribution, Snapshot

SOURCE = Path(ascend_envcheck.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_syntax_is_that_of_3_8_and_imports_are_of_the_standard_library(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert roots <= {*sys.stdlib_module_names, "ascend_envcheck"}


def test_the_import_is_light() -> None:
    code = "import sys, ascend_envcheck; print(*(name for name in sys.modules if name.startswith('ascend_envcheck')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ascend_envcheck"]


def test_the_manual_is_true() -> None:
    for name in ascend_envcheck.__all__:
        assert getattr(ascend_envcheck, name) is not None
    assert set(dir(ascend_envcheck)) == {*ascend_envcheck.__all__, "__version__"}
    with pytest.raises(AttributeError, match="colect"):
        ascend_envcheck.colect  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_a_module_offers_is_there(path: Path) -> None:
    parts = [part for part in path.relative_to(SOURCE.parent).with_suffix("").parts if part != "__init__"]
    if parts[-1] != "__main__":
        module = importlib.import_module(".".join(parts))
        assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


def test_the_version_is_the_one_of_the_distribution() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{ascend_envcheck.__version__}"' in pyproject
    assert f"## {ascend_envcheck.__version__}" in (Path(__file__).parents[1] / "CHANGELOG.md").read_text()


def test_every_error_is_drawn_and_a_standard_one_too() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.EnvcheckError]
    for kind in kinds:
        assert issubclass(kind, errors.EnvcheckError)
        assert kind.__name__ in (errors.__doc__ or "")
        assert any(issubclass(kind, base) for base in (ValueError, OSError))


def test_ids_are_unique_and_every_rule_is_told_in_both_languages() -> None:
    rules = ascend_envcheck.RULES
    assert len({rule.id for rule in rules}) == len(rules)
    for rule in rules:
        assert re.fullmatch(r"[A-Z0-9]+(-[A-Z0-9]+)*", rule.id)
        assert isinstance(rule.title, Message), rule.id
        assert re.search("[\u4e00-\u9fff]", told(rule.title, CHINESE)), rule.id
        assert rule.group in GROUPS
    assert all(re.search("[\u4e00-\u9fff]", told(name, CHINESE)) for name in GROUPS.values())


def test_the_readme_knows_every_command() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    printed = subprocess.run(
        [sys.executable, "-m", "ascend_envcheck", "--help"], capture_output=True, text=True, check=True
    ).stdout
    names = re.findall(r"^    ([a-z]+)  ", printed, flags=re.MULTILINE)
    assert len(names) == len(COMMANDS)
    for name in names:
        assert re.search(rf"^\| .*`{name}\b", readme, flags=re.MULTILINE), name


def test_a_rule_of_the_plan_is_there_under_its_name() -> None:
    """The ids of the catalogue are promised to be stable: other people's scripts say --only and --skip."""
    promised = (Path(__file__).parent / "stable_ids.txt").read_text().split()
    assert set(promised) <= {rule.id for rule in ascend_envcheck.RULES}


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "train.log").write_bytes(b"caf\xe9\nImportError: libatb.so: cannot open shared object file\n")
    code = code.replace("collect()", "collect(import_torch=False)")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert "root LIB-ATB 2 " in done.stdout
    assert "torch_npu='2.7.1" in done.stdout


def test_the_pack_of_the_readme_is_one(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (pack,) = re.findall(r"```json\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "ours.json").write_text(pack)
    (rule,) = read_pack(tmp_path / "ours.json")
    there = Snapshot(distributions={"diffusers": Distribution("0.29.0")})
    (finding,) = rule.judge(there)
    assert (finding.id, finding.severity.value) == ("OURS-DIFFUSERS", "WARN")
