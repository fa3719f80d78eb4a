"""How fast does ``ascend-envcheck explain`` read a log, beside grep, and in how much memory?

    python benchmarks/explain.py --megabytes 1000 --output explain.json

The log is made here: lines of a training run and of plog with running numbers, and one failure at its end. In one line
of so many (``--every``) stand words such as error and failed, which mean nothing: explain has to look closer at those.
Both commands read the same file in turns. grep counts the lines that hold one of as many fixed strings as explain has
rules: the longest plain text of each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ascend_envcheck.failures import Failure, failures, plain_texts

HEALTHY = (
    "[INFO] HCCL(4711,python):2026-03-0{d} 11:0{d}:{s:02d}.{n:06d} [hccl_comm.cc:{n}][4711]HcclGetRankSize rank {s}",
    "[EVENT] ASCENDCL(4711,python):2026-03-0{d}-11:0{d}:{s:02d}.{n:06d} [acl.cpp:{n}]5120 aclInit: start to execute",
    " iteration {n:8d}/ 5000000 | consumed samples: {n} | elapsed time per iteration (ms): {s}12.{d}"
    " | lm loss: 1.{n:06d}E+00 | grad norm: 0.{s} | number of skipped iterations: 0 | number of nan iterations: 0 |",
    "  {s}%|####      | {s}/100 [00:{s:02d}<00:{d}0, 1.{d}2s/it]",
)
WORDS = "[rank{d}]:2026-03-0{d} 11:00:{s:02d} INFO model.py:{s} layer {n} compared, error 0.0{n}, 0 of {n} failed"
FAILURE = """Traceback (most recent call last):
  File "train.py", line 12, in <module>
    import torch_npu
ImportError: libatb.so: cannot open shared object file: No such file or directory
"""
ANSWER = "LIB-ATB"


@dataclass(frozen=True)
class Run:
    """What one command took."""

    seconds: float
    megabytes: float  # resident, at most


def write_log(path: Path, megabytes: int, every: int) -> None:
    """Write a healthy log with a failure at its end."""
    size, number = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1_000_000:
            block = "".join(
                (HEALTHY[at % len(HEALTHY)] if at % every else WORDS).format(n=at, s=at % 60, d=at % 9 + 1) + "\n"
                for at in range(number, number + 20_000)
            )
            number += 20_000
            size += file.write(block)
        file.write(FAILURE)


def run(argv: list[str]) -> tuple[Run, str]:
    """Run a command to its end; return what it took and what it printed."""
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"}, text=True)
    assert process.stdout is not None, "it was asked for"
    printed = process.stdout.read()
    _, _, used = os.wait4(process.pid, 0)
    return Run(time.perf_counter() - started, used.ru_maxrss / 1000), printed


def main() -> int:
    """Measure, print a table, write JSON."""
    options = _parse()
    with tempfile.TemporaryDirectory() as name:
        log, words = Path(name) / "train.log", Path(name) / "words.txt"
        write_log(log, options.megabytes, options.every)
        words.write_text("".join(f"{_plainest(failure)}\n" for failure in failures()))
        commands = {
            "explain": [sys.executable, "-m", "ascend_envcheck", "explain", str(log), "--json"],
            "grep": ["grep", "-c", "-F", "-f", str(words), str(log)],
        }
        taken: dict[str, list[Run]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for command, argv in commands.items():
                found, printed = run(argv)
                taken[command].append(found)
                assert command == "grep" or ANSWER in printed, "the failure at the end was not found"
        size = log.stat().st_size / 1e6
    rate = {command: size / statistics.median(run.seconds for run in runs) for command, runs in taken.items()}
    memory = max(run.megabytes for run in taken["explain"])
    print(f"{size:.0f} MB, {len(failures())} rules, median of {options.rounds} rounds")
    print(f"explain {rate['explain']:8.1f} MB/s, {rate['explain'] / rate['grep']:.2f} × grep, {memory:.0f} MB resident")
    print(f"grep    {rate['grep']:8.1f} MB/s")
    if options.output is not None:
        runs = {command: [vars(run) for run in found] for command, found in taken.items()}
        options.output.write_text(json.dumps({"megabytes": size, "runs": runs}) + "\n", encoding="utf-8")
    return 0


def _plainest(failure: Failure) -> str:
    """The longest plain text that a line of this failure holds."""
    texts = [text for branch in plain_texts(failure.pattern) for text in branch] if failure.pattern else []
    return max([*texts, *failure.codes], key=len)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the log (default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="lines to one with such words (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where the single numbers go, as JSON (default: nowhere)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
