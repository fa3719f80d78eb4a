"""How long does converting a LLaVA data set take, and how much memory, beside ten lines of json and Hugging Face's map?

    python benchmarks/datafmt.py --records 150000 --rounds 5 --output datafmt.json

A seeded generator writes records like those of LLaVA-Instruct-150K: one array, one to four pairs of turns, about 1.5 KB
each, 80,000 different pictures. Three programs turn it into the messages format, none of them looking at pictures:

* ``json``: json.load, a loop over the first two turns, json.dump with an indent, as a published walk-through does it;
* ``datasets``: load_dataset("json"), map over all turns, to_json (lines; there is no array writer), a fresh cache;
* ``mm-datafmt``: all turns, every rule checked; once in one process, once with its default of one for each CPU.

Rounds are interleaved and the order turns; medians count. Memory is the peak of the largest process, from the operating
system; mm-datafmt's workers are as large as their parent, so its total is at most that times the number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PICTURES = 80_000
SENTENCE = (
    "the a bus is red and white parked on street with people walking near it what color why how many are there in this "
    "image man woman dog holding an umbrella large small table"
)


@dataclass(frozen=True)
class Run:
    """One measured process; the time of its processors includes that of its children."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def main() -> int:
    """Measure, print a table, write JSON; the exit code is 2 when a program fails."""
    arguments = _parse()
    if arguments.child:
        CHILDREN[arguments.child[0]](*arguments.child[1:])
        return 0
    folder = Path(tempfile.mkdtemp(prefix="datafmt-", dir=arguments.folder))
    try:
        source = folder / "llava.json"
        write_records(source, arguments.records)
        runs = measure(source, folder, arguments.rounds, arguments.programs)
        nbytes = source.stat().st_size
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_table(runs, arguments.records, nbytes)
    if arguments.output is not None:
        write_json(arguments.output, runs, arguments.records, nbytes)
    return 0


def write_records(path: Path, count: int) -> None:
    """Write ``count`` records, the same for the same count."""
    chance = random.Random(0)
    sentences = [
        " ".join(chance.choices(SENTENCE.split(), k=chance.randint(40, 60))).capitalize() + "." for _ in range(2000)
    ]

    def text(length: int) -> str:
        held = ""
        while len(held) < length:
            held += chance.choice(sentences) + " "
        return held[:length]

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            pairs = chance.choice((1, 1, 1, 4))
            turns = []
            for pair in range(pairs):
                turns.append({"from": "human", "value": "<image>\n" * (pair == 0) + text(60)})
                turns.append({"from": "gpt", "value": text(1150 if pairs == 1 else 300)})
            image = f"{chance.randrange(PICTURES):012d}.jpg"
            record = {"id": f"{number:012d}", "image": image, "conversations": turns}
            file.write((", " if number else "[") + json.dumps(record))
        file.write("]")


def measure(source: Path, folder: Path, rounds: int, programs: Sequence[str]) -> dict[str, list[Run]]:
    """Runs by program; a first round warms the page cache and does not count."""
    target = folder / "out.json"
    convert = [str(Path(sys.executable).parent / "mm-datafmt"), "convert", str(source), str(target), "--media", "none"]
    lines = {
        "json": _line("json", source, target),
        "datasets": _line("datasets", source, target, folder / "cache"),
        "mm-datafmt, 1 process": [*convert, "--workers", "1"],
        "mm-datafmt": convert,
    }
    names = [name for name in lines if name.split(",")[0] in programs]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            run = measured(lines[name])
            if number:
                runs[name].append(run)
            target.unlink()
            shutil.rmtree(folder / "cache", ignore_errors=True)
    return runs


def measured(line: Sequence[str]) -> Run:
    """Wall time, time of processors and peak memory of a process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, line)
    return Run(seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime, peak_mib=usage.ru_maxrss / 1024)


def print_table(runs: Mapping[str, Sequence[Run]], records: int, nbytes: int) -> None:
    """A line for each program: medians, and how many times as long as mm-datafmt."""
    print(f"{records} records, {nbytes / 1e6:.0f} MB, {os.cpu_count()} CPUs")
    print(f"{'program':22} {'seconds':>8} {'CPU s':>7} {'MB/s':>6} {'x ours':>7} {'peak MiB':>9}")
    ours = statistics.median(run.seconds for run in runs["mm-datafmt"]) if "mm-datafmt" in runs else None
    for program, measured_runs in runs.items():
        seconds = statistics.median(run.seconds for run in measured_runs)
        ratio = f"{seconds / ours:7.2f}" if ours else f"{'-':>7}"
        peak = max(run.peak_mib for run in measured_runs)
        busy = statistics.median(run.cpu_seconds for run in measured_runs)
        print(f"{program:22} {seconds:8.2f} {busy:7.2f} {nbytes / 1e6 / seconds:6.0f} {ratio} {peak:9.0f}")


def write_json(target: Path, runs: Mapping[str, Sequence[Run]], records: int, nbytes: int) -> None:
    """Write every single run, and what it was taken on."""
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    plain = {name: [asdict(run) for run in measured_runs] for name, measured_runs in runs.items()}
    text = json.dumps({"machine": machine, "records": records, "bytes": nbytes, "runs": plain}, indent=2)
    target.write_text(text + "\n", encoding="utf-8")


def with_json(source: str, target: str) -> None:
    """The walk-through's way: all in memory, the first two turns."""
    with Path(source).open(encoding="utf-8") as file:
        data = json.load(file)
    result = []
    for item in data:
        first, second = item["conversations"][:2]
        result.append(
            {
                "messages": [
                    {"role": "user", "content": first["value"]},
                    {"role": "assistant", "content": second["value"]},
                ],
                "images": ["./data/COCO2017/train2017/" + item["image"]],
            }
        )
    with Path(target).open("w", encoding="utf-8") as file:
        json.dump(result, file, ensure_ascii=False, indent=2)


def with_datasets(source: str, target: str, cache: str) -> None:
    """Hugging Face's way: to Arrow, map, out again."""
    import datasets

    roles = {"human": "user", "gpt": "assistant"}

    def converted(row: dict[str, list[dict[str, str]] | str]) -> dict[str, object]:
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]  # type: ignore[index]
        return {"messages": turns, "images": [row["image"]]}

    loaded = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
    loaded.map(converted, remove_columns=loaded.column_names).to_json(target, force_ascii=False)


CHILDREN: dict[str, Callable[..., None]] = {"json": with_json, "datasets": with_datasets}


def _line(*words: object) -> list[str]:
    return [sys.executable, __file__, "--child", *map(str, words)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=150_000, help="records of the data set (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: %(default)s)")
    parser.add_argument(
        "--programs",
        nargs="+",
        choices=("json", "datasets", "mm-datafmt"),
        default=("json", "datasets", "mm-datafmt"),
        help="which to run (default: all)",
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="where the single runs go, as JSON (default: nowhere)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
