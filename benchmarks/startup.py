"""How long does each command take to answer `--help`, beside a Python that does nothing?

    python benchmarks/startup.py --rounds 15 --output startup.json

The commands are those of the environment whose Python runs this file. Rounds are interleaved (nothing, command A,
command B, nothing, …), so that a busy moment of the machine hits all of them; medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMANDS = ("ascend-envcheck", "mm-datafmt", "mm-convert", "mm-finetune")
NOTHING = "python -c pass"


def main() -> int:
    """Measure, print a table, write JSON; the exit code is 2 when a command is missing or fails."""
    arguments = _parse()
    lines = {NOTHING: [sys.executable, "-c", "pass"]}
    lines |= {f"{name} --help": [str(Path(sys.executable).parent / name), "--help"] for name in COMMANDS}
    try:
        seconds = measure(lines, rounds=arguments.rounds)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        print_table(medians)
        if arguments.output is not None:
            write_json(arguments.output, seconds)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def measure(lines: Mapping[str, Sequence[str]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of wall clock of each command line, `rounds` times in turn; a first round warms the disk cache.

    Raises:
        OSError: a command is not installed.
        subprocess.CalledProcessError: a command failed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for number in range(rounds + 1):
        for name, line in lines.items():
            started = time.perf_counter()
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
            if number > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def print_table(medians: Mapping[str, float]) -> None:
    """A line for each command: its median in milliseconds, and how many times nothing's."""
    print(f"{'command':28} {'median':>10} {'ratio':>7}")
    for name, median in medians.items():
        print(f"{name:28} {median * 1000:7.0f} ms {median / medians[NOTHING]:6.1f}x")


def write_json(target: Path, seconds: Mapping[str, Sequence[float]]) -> None:
    """Write every single time, and what they were taken on."""
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    target.write_text(json.dumps({"machine": machine, "seconds": seconds}, indent=2) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_positive, default=15, help="rounds that count (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where the single times go, as JSON (default: nowhere)")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is expected")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
