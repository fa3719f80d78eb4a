"""Where the probes look."""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Sequence

from ascend_envcheck.probes.command import run
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.snapshot import MISSING, CommandFacts

_AT_ONCE = 8  # commands

Facts = Dict[str, Any]
"""Fields of a `Snapshot`; mappings of several probes are merged."""

_USUAL_FOLDERS = (
    "/usr/local/bin",
    "/usr/local/sbin",
    "/usr/bin",
    "/usr/sbin",
    "/sbin",
    "/usr/local/Ascend/driver/tools",
)


@dataclass(frozen=True)
class Place:
    """A machine to look at.

    Args:
        tree: its files.
        environ: the environment variables.
        search_path: folders of installed distributions.
        live: whether it is the machine that this runs on; else only its files are there.
        command_seconds: time limit of each command.
        import_seconds: time limit of each child process that imports something.
        smoke: whether small computations may run on the NPUs.
        peers: addresses of NPUs of other machines, to be asked for.
    """

    tree: Tree
    environ: Mapping[str, str]
    search_path: Sequence[str]
    live: bool
    command_seconds: float
    import_seconds: float
    smoke: bool = False
    peers: Sequence[str] = ()

    def find(self, program: str) -> str | None:
        """Where a program lies on the file system of this process: on PATH, else where its installer puts it."""
        for folder in [*self.environ.get("PATH", "").split(os.pathsep), *_USUAL_FOLDERS]:
            path = f"{folder}/{program}"
            if self.tree.resolve(path) is not None and os.access(str(self.tree.real(path)), os.X_OK):
                return str(self.tree.real(path))
        return None

    def run(self, program: str, *arguments: str) -> CommandFacts:
        """What came of a command, without a shell, within the time limit."""
        executable = self.find(program)
        if executable is None:
            detail = f"{program} is neither on PATH nor in /usr/local/bin or /usr/local/sbin"
            return CommandFacts(outcome=MISSING, detail=detail)
        outcome, detail, out, err = run([executable, *arguments], self.environ, seconds=self.command_seconds)
        return CommandFacts(outcome=outcome, detail=detail, output=out + err)

    def run_all(self, lines: Sequence[Sequence[str]]) -> dict[str, CommandFacts]:
        """Several commands side by side, by the line that a user would type."""
        answers: dict[str, CommandFacts] = {}
        waiting = deque(lines)

        def work() -> None:
            while True:
                try:
                    line = waiting.popleft()
                except IndexError:
                    return
                answers[" ".join(line)] = self.run(*line)

        # A thread pool would make Ctrl-C wait for all that is in its queue; the interpreter leaves these behind.
        threads = [threading.Thread(target=work, daemon=True) for _ in lines[:_AT_ONCE]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {" ".join(line): answers[" ".join(line)] for line in lines}
