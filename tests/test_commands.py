"""Every `--help`, of each command and of each subcommand, answers without the heavy libraries."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from house.tree import read_packages

HEAVY = ("torch", "transformers", "megatron", "torch_npu")
PACKAGES = read_packages()


def help_of(command: list[str]) -> tuple[str, set[str]]:
    """What `command --help` prints, and the top-level modules that it imports."""
    script = Path(sys.executable).parent / command[0]
    line = [sys.executable, "-X", "importtime", str(script), *command[1:], "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    imported = re.findall(r"^import time:.*\|\s*([\w.]+)$", done.stderr, re.MULTILINE)
    assert "argparse" in imported, "the trace of imports was not understood"
    return done.stdout, {module.partition(".")[0] for module in imported}


def subcommands(text: str) -> list[str]:
    """The subcommands in a help text, whose usage ends in dots: each on a line of its own, four blanks in."""
    usage = text.partition("\n\n")[0]
    return re.findall(r"^ {4}(\w[\w-]*)(?: {2,}|$)", text, re.MULTILINE) if usage.endswith("...") else []


def all_helps(command: list[str]) -> Iterator[tuple[list[str], str, set[str]]]:
    text, imported = help_of(command)
    yield command, text, imported
    mentioned = re.findall(rf"\b{' '.join(command)} (\w[\w-]*) --help", text)
    for name in [*subcommands(text), *mentioned]:
        yield from all_helps([*command, name])


def test_a_command_is_named_like_its_distribution() -> None:
    assert {name: package.scripts for name, package in PACKAGES.items()} == {name: (name,) for name in PACKAGES}


@pytest.mark.parametrize("name", PACKAGES)
def test_no_help_imports_a_heavy_library(name: str) -> None:
    seen = []
    for command, text, imported in all_helps([name]):
        assert "usage:" in text
        assert imported.isdisjoint(HEAVY), f"{' '.join(command)} --help imports {sorted(imported & set(HEAVY))}"
        seen.append(command)
    assert len(seen) > 1, "no subcommand was found"


def test_subcommands_are_found_in_the_styles_of_argparse_and_jsonargparse() -> None:
    text = (
        "usage: x [-h] COMMAND ...\n\ncommands:\n  COMMAND\n    a         the\n              first\n    b-c       it\n"
    )
    assert subcommands(text) == ["a", "b-c"]
    text = "usage: x {a_b} ...\n\nsubcommands:\n  Available subcommands:\n    a_b\n                 it\n"
    assert subcommands(text) == ["a_b"]
    assert subcommands("usage: x [-h]\n\n    --format  {a,b}\n    x         y\n") == []
