"""What do checkpoints cost a training run, beside training and in its way?

    OMP_NUM_THREADS=1 python benchmarks/checkpoints.py --rounds 3 --output checkpoints.json

The same run of a small Qwen2.5-VL (random weights, float32, AdamW, one process) three times a round: without
checkpoints, with one every `--every` steps written beside training, and with the same ones in its way. What the steps
take longer than those without is the cost of a checkpoint; the last table says what share of the time it is at an
interval of 100 steps. Rounds are interleaved, the order turns, medians count. A step here computes little for each
weight (about `--batch` records of LLaVA's lengths), as on a large machine a step of a small batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune_data import small, write_data, write_model

LONGEST, INTERVAL = 1024, 100
WAYS = {"none": ("0", "true"), "beside": ("every", "true"), "in its way": ("every", "false")}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        seconds: that the steps took by the clock, with what was saved between them.
        cpu_seconds: of the whole process, start and end included.
        step_seconds: median step.
        mib: size of a checkpoint.
        saves: checkpoints before the last step.
    """

    seconds: float
    cpu_seconds: float
    step_seconds: float
    mib: float
    saves: int


def main() -> int:
    """Measure and print."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        yaml = prepare(Path(name), arguments)
        runs: dict[str, list[Run]] = {way: [] for way in WAYS}
        for turn in range(arguments.rounds):
            order = list(WAYS)[turn % len(WAYS) :] + list(WAYS)[: turn % len(WAYS)]
            for way in order:
                runs[way].append(run(yaml, way, arguments))
                print(f"round {turn + 1}, {way}: {runs[way][-1].seconds:.2f} s", file=sys.stderr)
    print_table(runs)
    if arguments.output:
        plain = {way: [asdict(one) for one in several] for way, several in runs.items()}
        settings = {name: value for name, value in vars(arguments).items() if name not in {"output", "folder"}}
        text = json.dumps({"cpus": os.cpu_count(), "settings": settings, "runs": plain}, indent=2)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0


def prepare(folder: Path, arguments: argparse.Namespace) -> Path:
    """Data, model, converted weights and the configuration."""
    from mm_convert import Converter, Layout

    write_data(folder / "data", 64)
    layers = arguments.layers
    write_model(folder / "hf", small(hidden=arguments.hidden, layers=layers, vocabulary=4096), longest=LONGEST)
    layout = Layout(llm_pp_layers=((layers,),), vit_pp_layers=((layers,),))
    Converter.named("Qwen2_5_VLConverter").hf_to_mm(folder / "hf", folder / "mm", layout)
    settings = {
        "model": {"hf_dir": "hf", "load": "mm"},
        "data": {"path": "data/train.json", "seq_length": LONGEST, "packing": True, "truncate": "trim_text"},
        "train": {"steps": arguments.steps, "global_batch_size": arguments.batch, "lr": 1e-5},
        "output": {"dir": "run", "overwrite": True, "log_every": 1000, "keep_last": 1},
    }
    yaml = folder / "train.yaml"
    yaml.write_text(json.dumps(settings), encoding="utf-8")
    return yaml


def run(yaml: Path, way: str, arguments: argparse.Namespace) -> Run:
    """Train once in a process of its own."""
    every, beside = WAYS[way]
    each = str(arguments.every) if every == "every" else every
    options = [f"output.save_every={each}", f"output.async_save={beside}"]
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "mm_finetune", "train", str(yaml), *options], check=True, stdout=subprocess.DEVNULL
    )
    after = os.times()
    folder = yaml.parent / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row["step_s"] for row in rows[1:]]  # the first warms up
    size = sum(path.stat().st_size for path in (folder / "checkpoint").rglob("*") if path.is_file())
    return Run(
        seconds=sum(steps),
        cpu_seconds=after.children_user + after.children_system - before.children_user - before.children_system,
        step_seconds=statistics.median(steps),
        mib=size / 2**20,
        saves=(arguments.steps - 1) // arguments.every if every == "every" else 0,
    )


def print_table(runs: Mapping[str, Sequence[Run]]) -> None:
    """A line for each way."""
    base, step = _median(runs["none"], "seconds"), _median(runs["none"], "step_seconds")
    base_cpu = _median(runs["none"], "cpu_seconds")
    print(f"checkpoint {runs['none'][0].mib:.0f} MiB, median step {step:.3f} s")
    print(f"{'written':12} {'steps take s':>13} {'s a save':>9} {'at 100':>7} {'CPU s a save':>13} {'at 100':>7}")
    for way, several in runs.items():
        seconds, saves = _median(several, "seconds"), several[0].saves
        cells = ""
        if saves:
            for cost, width in ((seconds - base, 9), (_median(several, "cpu_seconds") - base_cpu, 13)):
                one = cost / saves
                cells += f" {one:{width}.3f} {one / (INTERVAL * step):7.1%}"
        print(f"{way:12} {seconds:13.2f}{cells}")


def _median(runs: Sequence[Run], field: str) -> float:
    return float(statistics.median(getattr(one, field) for one in runs))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("--rounds", 3, "rounds"),
        ("--steps", 33, "steps of a run"),
        ("--every", 8, "steps between checkpoints"),
        ("--batch", 4, "records of a step"),
        ("--hidden", 384, "width of the model; the vision tower's is half of it"),
        ("--layers", 4, "layers of the decoder, and of the tower"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="where the single runs go, as JSON (default: nowhere)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
