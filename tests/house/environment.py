"""A virtual environment that knows how it was made, and is made anew when that would come out differently."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from house.lending import lend, planned


class CommandError(RuntimeError):
    """A command ended with something else than 0; the message holds the command and its exit code."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What fills an environment.

    Attributes:
        installs: argument lists of `pip install`, carried out in this order.
        depends_on: texts that decide what these calls bring (constraints, declared dependencies); a change in one
            of them makes the environment out of date.
    """

    installs: tuple[tuple[str, ...], ...]
    depends_on: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A name for what comes out: equal recipes under equal Pythons have equal digests."""
        parts = (sys.version, sys.base_prefix, *map(repr, self.installs), *self.depends_on)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Environment:
    """A virtual environment of this Python in the folder `path`."""

    path: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def seal(self) -> Path:
        """The file with the digest of the recipe that it was made by; there is none while it is being made."""
        return self.path / "recipe.sha256"

    def command(self, name: str) -> Path:
        """The console script `name` inside."""
        return self.path / "bin" / name

    def prepare(self, recipe: Recipe, *, lender: Environment | None = None) -> bool:
        """Make it as `recipe` says, unless it already is; True when it was made anew.

        The recipe's digest is removed first and written last: an interrupted making is never taken for a finished one.
        pip decides what comes in. What a finished `lender` holds in the version that pip chose is taken from there,
        which saves most of the time and changes nothing else.

        Raises:
            CommandError: the environment cannot be made, or pip found no way.
        """
        if self.seal.is_file() and self.seal.read_text(encoding="utf-8") == recipe.digest:
            return False
        self.seal.unlink(missing_ok=True)
        # Not venv: that takes four times as long, and brings the pip of Python's release day, which resolves slowly.
        execute([sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(self.path)])
        for arguments in recipe.installs:
            if lender is not None and lender.seal.is_file():
                self._borrow(lender, arguments)
            self.install(*arguments)
        self.seal.write_text(recipe.digest, encoding="utf-8")
        return True

    def _borrow(self, lender: Environment, arguments: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            self.install("--dry-run", "--report", str(report), *arguments)
            lend(planned(report), lender=lender.path, borrower=self.path)

    def install(self, *arguments: str) -> None:
        """Run `pip install` inside, with its progress where somebody watches; raises `CommandError`."""
        verbosity = () if sys.stdout.isatty() else ("--quiet",)
        self.run("-m", "pip", "--disable-pip-version-check", "install", *verbosity, *arguments)

    def run(self, *arguments: str | Path, cwd: Path | None = None, variables: Mapping[str, str] | None = None) -> None:
        """Run its Python, with nothing of the outside in the way; raises `CommandError`.

        `PYTHONPATH` and the user's site-packages would lend the environment what it lacks, so both are shut off. Its
        own commands are the first on `PATH`. `variables` come on top.
        """
        execute([str(self.python), *map(str, arguments)], cwd=cwd, env={**self.variables(), **(variables or {})})

    def variables(self) -> dict[str, str]:
        """The process variables that `run` uses."""
        kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        path = os.pathsep.join([str(self.path / "bin"), kept.get("PATH", os.defpath)])
        return {**kept, "PATH": path, "VIRTUAL_ENV": str(self.path), "PYTHONNOUSERSITE": "1"}


def execute(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    """Print `command`, run it, and raise `CommandError` when it fails."""
    print("+", shlex.join(command), flush=True)
    code = subprocess.run(command, cwd=cwd, env=env, check=False).returncode
    if code != 0:
        raise CommandError(f"exit code {code}: {shlex.join(command)}")
