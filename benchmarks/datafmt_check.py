"""How much faster is ``mm-datafmt check`` than decoding every image?

Writes ``--files`` real JPEG photographs (crops of scikit-image's, in the sizes of COCO) and a data set that names each
once, then measures, in turns: a loop that opens and decodes each with Pillow; ``Image.open`` without decoding;
``check`` with header reads, without and with threads; ``check`` without a look at images and with ``--decode``.
The page cache is warm. Prints medians of ``--rounds`` (wall and processor time) and writes all as JSON.

    python benchmarks/datafmt_check.py --files 10000 --json datafmt_check.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from skimage import data

from mm_datafmt import check

SIZES = ((640, 480), (640, 427), (500, 375), (480, 640))
WORDS = ("the", "image", "shows", "a", "man", "in", "front", "of", "his", "yellow", "taxi", "on", "a", "busy", "street")


def write_images(folder: Path, count: int) -> list[Path]:
    """Write ``count`` crops of photographs, all different."""
    photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "coffee", "chelsea")]
    chance, files = random.Random(0), []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        left, top = (0.3 * chance.random() * side for side in photograph.size)
        box = (left, top, left + 0.7 * photograph.width, top + 0.7 * photograph.height)
        files.append(folder / f"{number:06d}.jpg")
        photograph.resize(chance.choice(SIZES), box=box).save(files[-1], quality=90)
    return files


def write_records(path: Path, files: list[Path]) -> None:
    """Write a LLaVA-like data set of one to five exchanges a record, 1.5 KB on average."""
    chance, records = random.Random(1), []
    for number, file in enumerate(files):
        turns = []
        for exchange in range(chance.randint(1, 5)):
            question = " ".join(chance.choices(WORDS, k=8))
            turns.append({"from": "human", "value": f"<image>\n{question}?" if not exchange else f"{question}?"})
            turns.append({"from": "gpt", "value": " ".join(chance.choices(WORDS, k=chance.randint(3, 90))) + "."})
        records.append({"id": str(number), "image": file.name, "conversations": turns})
    path.write_text(json.dumps(records))


def decode_all(files: list[Path]) -> None:
    """Decode every image, as a trainer's preprocessing does."""
    for file in files:
        with Image.open(file) as image:
            image.convert("RGB")


def open_all(files: list[Path]) -> None:
    """Let Pillow read every header."""
    for file in files:
        with Image.open(file) as image:
            _ = image.size


def require_clean(path: Path, **arguments: object) -> None:
    """Run ``check``; the time of a failed one would mean nothing."""
    report = check(path, **arguments)  # type: ignore[arg-type]
    if not report.ok:
        raise SystemExit(report.describe())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_images(folder, options.files)
        source = folder / "set.json"
        write_records(source, files)
        methods: dict[str, Callable[[], None]] = {
            "decode loop (Pillow)": lambda: decode_all(files),
            "open loop (Pillow)": lambda: open_all(files),
            "check, no threads": lambda: require_clean(source, workers=0),
            "check, 4 threads": lambda: require_clean(source, workers=4),
            "check, no media": lambda: require_clean(source, media="none"),
            "check --decode": lambda: require_clean(source, media="decode"),
        }
        times: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
        for _ in range(options.rounds):
            for method, run in methods.items():
                wall, processor = time.perf_counter(), time.process_time()
                run()
                times[method].append((time.perf_counter() - wall, time.process_time() - processor))
    medians = {
        method: [statistics.median(column) for column in zip(*runs, strict=True)] for method, runs in times.items()
    }
    base = medians["decode loop (Pillow)"]
    print(f"{options.files} files; times faster than decoding in brackets")
    for method, (wall, processor) in medians.items():
        ratios = base[0] / wall, base[1] / processor
        print(f"{method:22} {wall:8.3f} s ({ratios[0]:5.1f})  processor {processor:8.3f} s ({ratios[1]:5.1f})")
    if options.json:
        options.json.write_text(json.dumps({"files": options.files, "wall_and_processor_seconds": times}, indent=2))


if __name__ == "__main__":
    main()
