"""How much of a GPU or NPU does training use, and does `plan` foresee its memory? Published sizes, random weights.

    python benchmarks/finetune_device.py --runs 3b 7b-lora --output device.json

The data set of `finetune.py`, packed, in bfloat16, by the real `mm-finetune train` in a process of its own: tokens are
those of the records, MFU counts what the model needs (`mm_finetune.watching.flops`), the median over all steps but the
first two counts. Memory is the most that torch allocated, beside what `mm-finetune plan` says for the same
configuration and its longest rows; with `--check` also what one step's passes took, beside the plan for just these
micro-batches. 3b and 7b-half want 140 GiB of memory. Weights go to disk twice (7.5 GB each for 3B, 16.6 GB for 7B);
`--folder /dev/shm/…` saves time. The folder is used again by the next call that names it. On a CPU `--runs tiny` tries
out the script itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from finetune_data import Size, write_data, write_model

from mm_convert import Converter, Layout

LONGEST = 2048
LEFT_OUT = 2
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, and how."""

    size: Size
    settings: Sequence[str] = ()


# Sizes of the published config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct.
VISION: dict[str, Any] = {
    "vision": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    "full_attention": [7, 15, 23, 31],
}
SMALL = Size(hidden=2048, ffn=11008, layers=36, heads=16, groups=2, vocabulary=151936, tied=True, **VISION)
LARGE = Size(hidden=3584, ffn=18944, layers=28, heads=28, groups=4, vocabulary=152064, tied=False, **VISION)
TINY = Size(
    hidden=128, ffn=352, layers=2, heads=4, groups=2, vocabulary=2048, tied=True,
    vision={"depth": 2, "hidden_size": 64, "intermediate_size": 176, "num_heads": 4}, full_attention=[1],
)  # fmt: skip
LORA = ("lora.r=16", "lora.alpha=32")
# All of 7B's optimizer state would need 140 GiB and more: half of its layers, or adapters.
RUNS = {
    "3b": Run(size=SMALL),
    "3b-recompute": Run(size=SMALL, settings=("train.recompute=selective",)),
    "7b-half": Run(size=replace(LARGE, layers=14)),
    "7b-lora": Run(size=LARGE, settings=LORA),
    "tiny": Run(size=TINY),
    "tiny-lora": Run(size=TINY, settings=LORA),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a run.

    Attributes:
        tokens_per_second: of one device.
        mfu: 0 to 1; None where the device's peak is not known.
        data_wait: share of the time.
        memory_gib: most that was allocated; on a CPU that the process held.
        planned_gib: what the plan said.
        checked: what `mm-finetune check` said of the passes of the first step.
    """

    tokens_per_second: float
    mfu: float | None
    data_wait: float
    memory_gib: float
    planned_gib: float
    checked: str | None


def main() -> int:
    """Measure; the exit code is 2 when a run fails."""
    arguments = _parse()
    try:
        return measure_all(arguments)
    except KeyboardInterrupt:
        print("interrupted; runs that were done are told above", file=sys.stderr)
        return 130


def measure_all(arguments: argparse.Namespace) -> int:
    """Print a line for each run, and write JSON after it."""
    results: dict[str, Result] = {}
    failed = False
    with _folder(arguments.folder) as folder:
        records = arguments.batch * arguments.steps
        data = folder / f"data-{records}"
        if not (data / "train.json").is_file():  # its last file
            shutil.rmtree(data, ignore_errors=True)
            write_data(data, records)
        for name in arguments.runs:
            try:
                results[name] = measure(folder, name, arguments)
            except subprocess.CalledProcessError as error:
                print(f"{name}: {error}\n{error.output[-3000:]}", file=sys.stderr, flush=True)
                failed = True
                continue
            print(f"{name}: {_words(results[name])}", flush=True)
            if arguments.output is not None:
                write_json(arguments.output, results, arguments)
    return 2 if failed else 0


def measure(folder: Path, name: str, arguments: argparse.Namespace) -> Result:
    """Prepare and train.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    run, device = RUNS[name], _device()
    label = next(known for known, other in RUNS.items() if other.size == run.size)
    hf_dir, mm_dir = folder / f"{label}-hf", folder / f"{label}-mm"
    if not mm_dir.is_dir():
        # In a process that ends: what torch keeps of a device's memory would be missing in training.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(make_model, hf_dir, mm_dir, run.size, device).result()
    yaml = folder / f"{name}.yaml"
    train = {
        "steps": arguments.steps, "global_batch_size": arguments.batch, "micro_batch_size": 1, "dtype": "bf16",
        "lr": 1e-5, "min_lr": 1e-5, "warmup_fraction": 0,
    }  # fmt: skip
    data = {
        "path": str(folder / f"data-{arguments.batch * arguments.steps}/train.json"), "seq_length": LONGEST,
        "packing": True, "pack_length": arguments.pack_length, "workers": arguments.workers,
    }  # fmt: skip
    output = {"dir": str(folder / f"{name}-out"), "overwrite": True, "save_every": arguments.steps + 1}
    sections = {"model": {"hf_dir": str(hf_dir), "load": str(mm_dir)}, "data": data, "train": train, "output": output}
    yaml.write_text(json.dumps(sections), encoding="utf-8")
    plan = _command("plan", yaml, *run.settings, "--device", device, "--json")
    stages = json.loads(plan)["configured"]["stages"]
    checked = None
    if arguments.check:
        lines = _command("check", yaml, *run.settings).splitlines()
        checked = " ".join(next(line for line in lines if "forward and backward" in line).split())
    _command("train", yaml, *run.settings, *arguments.set)
    text = (folder / f"{name}-out/metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()][LEFT_OUT:]
    mfu = [row["mfu"] for row in rows if row["mfu"] is not None]
    return Result(
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows),
        mfu=statistics.median(mfu) if mfu else None,
        data_wait=statistics.median(row["data_wait"] for row in rows),
        memory_gib=rows[-1]["memory_gib"],
        planned_gib=stages[0]["total"] / GIB,
        checked=checked,
    )


def make_model(hf_dir: Path, mm_dir: Path, size: Size, device: str) -> None:
    """Random weights, as a Hugging Face folder and converted for one process."""
    write_model(hf_dir, size, longest=LONGEST, dtype="bfloat16", device=device)
    layout = Layout(llm_pp_layers=((size.layers,),), vit_pp_layers=((size.vision["depth"],),), tp_size=1)
    Converter.named("Qwen2_5_VLConverter").hf_to_mm(hf_dir, mm_dir, layout)


def write_json(target: Path, results: Mapping[str, Result], arguments: argparse.Namespace) -> None:
    """Write what there is so far, and what it was taken on."""
    import torch

    device = _device()
    name = "cpu" if device == "cpu" else torch.get_device_module(device).get_device_name()
    settings = {key: value for key, value in vars(arguments).items() if key not in {"output", "folder"}}
    plain = {run: asdict(result) for run, result in results.items()}
    told = {"device": name, "torch": torch.__version__, "settings": settings, "runs": plain}
    target.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _device() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else "cpu"


def _command(*words: str | Path) -> str:
    line = [sys.executable, "-m", "mm_finetune", *map(str, words)]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout[done.stdout.rfind("\n{") + 1 :] if "--json" in words else done.stdout


def _words(result: Result) -> str:
    mfu = "-" if result.mfu is None else f"{result.mfu:.1%}"
    return (
        f"{result.tokens_per_second:.0f} tokens/s, MFU {mfu}, data wait {result.data_wait:.0%},"
        f" {result.memory_gib:.1f} GiB held, {result.planned_gib:.1f} GiB planned"
        f" ({result.memory_gib / result.planned_gib - 1:+.0%})"
        + (f"; stage, planned, measured: {result.checked}" if result.checked else "")
    )


@contextmanager
def _folder(named: Path | None) -> Iterator[Path]:
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        yield named.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="finetune-device-") as made:
        yield Path(made)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=["3b", "7b-half", "7b-lora"])
    for name, default, what in (
        ("--steps", 8, f"optimizer steps; the first {LEFT_OUT} don't count"),
        ("--batch", 128, "records of a step"),
        ("--pack-length", 4096, "longest row in tokens"),
        ("--workers", 8, "threads that read pictures"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting of the runs, in train alone"
    )
    parser.add_argument("--check", action="store_true", help="also compare the passes' memory with the plan")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="where the results go, as JSON (default: nowhere)")
    arguments = parser.parse_args()
    if arguments.steps <= LEFT_OUT:
        parser.error(f"--steps is {arguments.steps}; it must be above {LEFT_OUT}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
