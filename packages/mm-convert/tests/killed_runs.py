"""A process without torch that converts again and again, each time killed at another moment, and resumes.

    python killed_runs.py HF FOLDER MOMENTS

A moment is the n-th call that touches the disk. Each run is a fork, which kills itself.
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

from mm_convert import Converter, Layout, execute  # noqa: F401
from mm_convert.output import scratch_of

QWEN = Converter.named("Qwen2_5_VLConverter")
LAYOUT = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2)
TOUCHING = ("pwrite", "preadv", "open", "mkdir", "rename", "unlink", "rmdir", "replace")


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


def convert(hf: Path, target: Path, *, moment: int = 0, after: bool = False, resume: bool = False) -> tuple[int, int]:
    """Convert in a fork; its exit code (negative: the signal that ended it), and the calls that it made."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        countdown = Countdown(moment, after=after)
        try:
            QWEN.hf_to_mm(hf, target, LAYOUT, resume=resume, workers=2)
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


def main(hf: Path, folder: Path, moments: int) -> None:
    """Raise AssertionError at the first run that leaves a wrong folder."""
    target = folder / "mm"
    assert "torch" not in sys.modules
    status, total = convert(hf, target)
    assert status == 0
    undisturbed = files(target)
    shutil.rmtree(target)
    shorter = 0
    chosen = random.Random(0).sample(range(1, total - 8), moments - 8) + list(range(total - 7, total + 1))
    for number, moment in enumerate(chosen):
        after = bool(number % 2)
        assert convert(hf, target, moment=moment, after=after)[0] == -signal.SIGKILL, f"moment {moment}"
        assert not target.exists() or files(target) == undisturbed, f"moment {moment}: half a folder"
        # Killed a second time while it goes on, then left alone.
        second, _ = convert(hf, target, moment=moment // 2 + 1, after=after, resume=True)
        assert second in (-signal.SIGKILL, 0), f"moment {moment}"
        assert not target.exists() or files(target) == undisturbed, f"moment {moment}: half a folder, resumed"
        status, count = convert(hf, target, resume=True)
        assert status == 0, f"moment {moment}"
        assert files(target) == undisturbed, f"moment {moment}: other bytes"
        assert not scratch_of(target).exists(), f"moment {moment}: leftovers"
        shorter += count < total - 10
        shutil.rmtree(target)
    print(f"{len(chosen)} moments of {total}, {shorter} resumed runs did less than a whole one")
    assert shorter > moments // 3


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
