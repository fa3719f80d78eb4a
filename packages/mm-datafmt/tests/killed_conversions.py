"""``mm-datafmt convert``, ended by a signal at random moments, then resumed: nothing half-done appears, same bytes.

    python killed_conversions.py FOLDER MOMENTS [SEED]

Arrays, JSON lines, gzip and parquet, in sequence, shuffled and weighted, with validation records and bad ones. A moment
is a time after the first thing that appears on the disk, or (each third) a moment of the start.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND = (sys.executable, "-W", "ignore", "-c")
PROGRAM = """
import sys
from mm_datafmt import conversion
conversion.CHECKPOINT_SECONDS = 0.01
from mm_datafmt.cli import main
sys.exit(main(sys.argv[1:]))
"""
OPTIONS = ("--media", "none", "--on_bad", "skip", "--val_ratio", "0.1")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SUFFIXES = (".json", ".val.json", ".bad.jsonl")


def make_sources(folder: Path, records: int) -> dict[str, list[str]]:
    """Write the inputs; return the arguments of each conversion, by name."""
    chance = random.Random(3)
    values = []
    for number in range(records):
        answer = "" if number % 19 == 0 else "ä" * chance.randrange(900)
        turns = [{"from": "human", "value": f"q{number}"}, {"from": "gpt", "value": answer}]
        values.append({"id": number, "conversations": turns})
    lines = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    array = b"[" + b",\n".join(lines) + b"]"
    (folder / "a.json").write_bytes(array)
    (folder / "b.jsonl").write_bytes(b"\n".join(lines[::2]) + b"\n")
    (folder / "c.json.gz").write_bytes(gzip.compress(array, 1))
    a, b, c, d = (str(folder / name) for name in ("a.json", "b.jsonl", "c.json.gz", "d.parquet"))
    chosen = {
        "array": [a],
        "lines": [b],
        "gzip": [c],
        "array shuffled": [a, "--shuffle", "--seed", "5"],
        "gzip shuffled": [c, "--shuffle"],
        "weighted": [f"{a}=0.7", f"{b}=0.3", "--shuffle"],
        "two in sequence, one worker": [a, c, "--workers", "1"],
    }
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return chosen
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), d, row_group_size=200)
    return {**chosen, "parquet": [d], "parquet shuffled": [d, "--shuffle"]}


def convert(arguments: Sequence[str], target: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start a conversion."""
    sources = [argument for argument in arguments if "/" in argument]
    options = arguments[len(sources) :]
    line = (*COMMAND, PROGRAM, "convert", *sources, str(target), *options, *OPTIONS, *more)
    return subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def outputs(target: Path) -> dict[str, bytes]:
    """What has its final name."""
    paths = [target.with_suffix(suffix) for suffix in SUFFIXES]
    return {path.suffixes[0]: path.read_bytes() for path in paths if path.exists()}


def stop(process: subprocess.Popen[bytes], target: Path, moment: float, number: signal.Signals, *, early: bool) -> int:
    """Send the signal so long after the first sign of life, and return the exit code."""
    while not early and process.poll() is None and not list(target.parent.glob(f".{target.name}.*")):
        time.sleep(0.001)
    time.sleep(moment)
    process.send_signal(number)
    text = process.communicate(timeout=60)[1]
    # Python itself ends by the signal, with a traceback, where Ctrl-C comes behind our last line.
    assert b"Traceback" not in text or process.returncode == -signal.SIGINT, text.decode()
    return process.returncode


def kill_and_resume(name: str, arguments: Sequence[str], folder: Path, moments: int, chance: random.Random) -> str:
    """Raise AssertionError at the first wrong result; else say what was done."""
    whole, target = folder / "whole.json", folder / "out.json"
    for path in folder.iterdir():
        path.unlink()
    started = time.monotonic()
    process = convert(arguments, whole)
    text = process.communicate(timeout=120)[1]
    assert process.returncode == 0, text.decode()
    span = time.monotonic() - started
    wanted = outputs(whole)
    assert len(wanted) == len(SUFFIXES)
    killed = 0
    for moment in range(moments):
        for path in folder.glob("*out.*"):
            path.unlink()
        attempts, code = 0, -1
        while code != 0:
            resume = ("--resume",) if attempts else ()
            process = convert(arguments, target, *resume)
            if attempts < 1 + moment % 3:
                early = (attempts + moment) % 3 == 2
                sent = signal.SIGKILL if early else chance.choice(SIGNALS)
                code = stop(process, target, chance.random() * span * 0.6, sent, early=early)
                if code != 0:
                    assert code in (-sent, 130), f"{name}: {code} after {sent!r}"
                    killed += 1
                    assert not target.exists() or outputs(target) == wanted, f"{name}: half a file under its name"
                    if target.exists():  # killed behind the last step
                        break
            else:
                text = process.communicate(timeout=120)[1]
                code = process.returncode
                assert code == 0, f"{name}, moment {moment}, attempt {attempts}: {text.decode()}"
            attempts += 1
        assert outputs(target) == wanted, f"{name}, moment {moment}: other bytes"
        if code == 0:
            assert not list(folder.glob(".*")), f"{name}: leftovers {list(folder.glob('.*'))}"
    return f"{name}: {moments} conversions of {span:.2f} s, {killed} times ended"


def main(folder: Path, moments: int, seed: int = 0, records: int = 6000) -> list[str]:
    """Go through all kinds in turn, `moments` conversions in all."""
    sources, work = folder / "sources", folder / "work"
    for path in (sources, work):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    chance = random.Random(seed)
    kinds = list(make_sources(sources, records).items())
    shares = [moments // len(kinds) + (number < moments % len(kinds)) for number in range(len(kinds))]
    pairs = zip(kinds, shares, strict=True)
    return [kill_and_resume(name, how, work, share, chance) for (name, how), share in pairs if share]


if __name__ == "__main__":
    print("\n".join(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
