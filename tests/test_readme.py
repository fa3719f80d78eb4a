"""The README keeps its word: two commands, the second is what CI runs, and the table tells what is there."""

import os
import re
from pathlib import Path

import pytest

from house.boundaries import ALLOWED
from house.tree import ROOT, read_packages

ENGLISH = ROOT / "README.md"
CHINESE = ROOT / "README.zh-CN.md"
THERE = {ENGLISH: "yes", CHINESE: "可用"}
NOT_YET = {ENGLISH: "not yet", CHINESE: "尚未提供"}
BOTH = pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["en", "zh"])


def commands(readme: Path) -> list[str]:
    """The lines of all shell blocks."""
    text = readme.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def rows(readme: Path) -> dict[str, tuple[bool, str]]:
    """Of each package in the table: whether its name is a link, and the last column."""
    pattern = r"^\| (\[?)`([\w-]+)`(?:\]\(packages/\2\))? \|.*\| ([^|]+) \|$"
    found = re.findall(pattern, readme.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (bool(bracket), status) for bracket, name, status in found}


@BOTH
def test_there_are_exactly_two_set_up_commands(readme: Path) -> None:
    demo, test = commands(readme)
    assert demo.endswith("/nox -s demo")
    assert test.endswith("/nox")
    assert demo.removesuffix(" -s demo") == test


def test_both_languages_show_the_same_commands() -> None:
    assert commands(CHINESE) == commands(ENGLISH)


def test_ci_runs_the_second_command_to_the_letter() -> None:
    script = ROOT / ".ci" / "run"
    *_, last = script.read_text(encoding="utf-8").splitlines()
    assert last == commands(ENGLISH)[1]
    assert os.access(script, os.X_OK)


@BOTH
def test_the_table_names_the_eight_packages(readme: Path) -> None:
    assert set(rows(readme)) == set(ALLOWED)


@BOTH
def test_the_table_says_what_is_there(readme: Path) -> None:
    there = set(read_packages())
    expected = {name: (name in there, (THERE if name in there else NOT_YET)[readme]) for name in ALLOWED}
    assert rows(readme) == expected


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "meta/README.md"])
def test_every_link_inside_the_repository_leads_somewhere(page: str) -> None:
    file = ROOT / page
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text(encoding="utf-8"))
    assert [target for target in targets if not (file.parent / target).exists()] == []
