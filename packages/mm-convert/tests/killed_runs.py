"""A process without torch that converts again and again, each time killed at another moment, and resumes.

    python killed_runs.py HF FOLDER MOMENTS [SEED]

A moment is the n-th call that touches the disk: MOMENTS of them at random, and the last few each. Each run is a fork,
which kills itself. Both directions, the way back with a third of the moments and with `fsync`.
"""

from __future__ import annotations

import importlib.metadata  # noqa: F401  # before the forks, so that none of them has to
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm_convert import Conversion, Converter, Layout, execution  # noqa: F401
from mm_convert.output import scratch_of

QWEN = Converter.named("Qwen2_5_VLConverter")
LAYOUT = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2)
TOUCHING = ("pwrite", "preadv", "open", "mkdir", "rename", "unlink", "rmdir", "replace", "fsync")
LAST = 8
TRACKER = "latest_checkpointed_iteration.txt"
Prepare = Callable[[], Conversion]


class Countdown:
    """Counts calls of the functions in TOUCHING; at the given one the process is killed before or after it."""

    def __init__(self, moment: int, *, after: bool) -> None:
        self.moment, self.after, self.count, self.lock = moment, after, 0, threading.Lock()
        for name in TOUCHING:
            setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self.lock:
                self.count += 1
                last = self.count == self.moment
            if last and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **named)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def convert(prepare: Prepare, *, moment: int = 0, after: bool = False, **how: Any) -> tuple[int, int]:
    """Convert in a fork; its exit code (negative: the signal that ended it), and the calls that it made."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        countdown = Countdown(moment, after=after)
        try:
            prepare().run(workers=2, **how)
            os.write(writer, str(countdown.count).encode())
        finally:
            os._exit(sys.exc_info()[0] is not None)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = int(os.read(reader, 99) or b"0")
    os.close(reader)
    return status, count


def files(directory: Path) -> dict[str, bytes]:
    """Everything under a folder."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def check(target: Path, undisturbed: dict[str, bytes], when: str) -> None:
    """A whole folder or none; and a tracker, wherever it is, stands in a whole one."""
    assert not target.exists() or files(target) == undisturbed, f"{when}: half a folder"
    made = scratch_of(target) / "new"
    if (made / TRACKER).exists():
        assert {**files(made), TRACKER: b"release"} == undisturbed, f"{when}: a tracker in half a folder"


def kill_and_resume(prepare: Prepare, moments: int, chance: random.Random, **how: Any) -> str:
    """Raise AssertionError at the first run that leaves a wrong folder; else say what was done."""
    target = prepare().target.directory
    status, total = convert(prepare, **how)
    assert status == 0
    undisturbed = files(target)
    shutil.rmtree(target)
    shorter = 0
    chosen = chance.sample(range(1, total - LAST), moments) + list(range(total - LAST + 1, total + 1))
    for number, moment in enumerate(chosen):
        after, when = bool(number % 2), f"moment {moment}"
        assert convert(prepare, moment=moment, after=after, **how)[0] == -signal.SIGKILL, when
        check(target, undisturbed, when)
        # Killed a second time while it goes on, then left alone.
        second, _ = convert(prepare, moment=moment // 2 + 1, after=after, resume=True, **how)
        assert second in (-signal.SIGKILL, 0), when
        check(target, undisturbed, f"{when}, resumed")
        status, count = convert(prepare, resume=True, **how)
        assert status == 0, when
        assert files(target) == undisturbed, f"{when}: other bytes"
        assert not scratch_of(target).exists(), f"{when}: leftovers"
        shorter += count < total - 10
        shutil.rmtree(target)
    assert shorter > len(chosen) // 3
    return f"{len(chosen)} moments of {total}, {shorter} resumed runs did less than a whole one"


def main(hf: Path, folder: Path, moments: int, seed: int = 0) -> None:
    """Both directions."""
    assert "torch" not in sys.modules
    chance = random.Random(seed)
    print(kill_and_resume(lambda: QWEN.prepare_hf_to_mm(hf, folder / "mm", LAYOUT), moments, chance))
    QWEN.hf_to_mm(hf, folder / "mm", LAYOUT)
    back = folder / "back"
    print(kill_and_resume(lambda: QWEN.prepare_mm_to_hf(folder / "mm", hf, back), moments // 3, chance, fsync=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
