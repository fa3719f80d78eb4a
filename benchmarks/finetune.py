"""How many tokens a second does mm-finetune train, beside Hugging Face's Trainer and TRL's SFTTrainer?

    pip install trl      # the only one that is not there already; left out with a word if it is missing
    OMP_NUM_THREADS=1 python benchmarks/finetune.py --rounds 3 --output finetune.json

A seeded data set with the lengths of LLaVA's (log-normal conversations, pictures of 64 to 330 tokens as JPEG files), a
small Qwen2.5-VL with random weights, float32, AdamW, one process. All programs take the same records in the same steps,
and must agree on the loss of the first one. A program's steps behind the first count; tokens are those of the records,
never padding. Rounds are interleaved, the order turns, medians count. Memory is the peak of the process, from the
operating system. At last ours on one and on two processes, data-parallel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune_data import small, write_data, write_model

LONGEST = 2048
SAME_LOSS = 2e-4  # float32, other orders of summation
PROGRAMS: dict[str, tuple[str, ...]] = {
    "ours": ("ours",),
    "ours, packed": ("ours", "data.packing=true"),
    "Trainer": ("trainer",),
    "Trainer, grouped": ("trainer-grouped",),
    "TRL": ("trl",),
    "TRL, grouped": ("trl-grouped",),
}
SCALING = {"ours, 1 process": 1, "ours, 2 processes": 2}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured process.

    Attributes:
        tokens_per_second: by the clock.
        tokens_per_cpu_second: by the processor's time of the process, which other programs disturb less; a data
            loader's workers are not in it.
        peak_mib: most memory of the process.
        loss: of the first step.
    """

    tokens_per_second: float
    tokens_per_cpu_second: float
    peak_mib: float
    loss: float


def main() -> int:
    """Measure, print a table, write JSON; the exit code is 1 when losses differ, 2 when a program fails."""
    arguments = _parse()
    folder = Path(tempfile.mkdtemp(prefix="finetune-", dir=arguments.folder))
    try:
        yaml = prepare(folder, arguments)
        runs = measure(yaml, arguments)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_table(runs)
    if arguments.output is not None:
        write_json(arguments.output, runs, arguments)
    losses = [run.loss for several in runs.values() for run in several]
    if max(losses) - min(losses) > SAME_LOSS:
        print(f"the programs do not do the same work: losses from {min(losses)} to {max(losses)}", file=sys.stderr)
        return 1
    return 0


def prepare(folder: Path, arguments: argparse.Namespace) -> Path:
    """Write data set, model and configuration; returns the YAML."""
    from mm_convert import Converter, Layout

    records = arguments.steps * arguments.batch
    write_data(folder / "data", records)
    layers = arguments.layers
    size = small(hidden=arguments.hidden, layers=layers, vocabulary=arguments.vocabulary)
    write_model(folder / "hf", size, longest=LONGEST)
    layout = Layout(llm_pp_layers=((layers,),), vit_pp_layers=((layers,),), tp_size=1)
    Converter.named("Qwen2_5_VLConverter").hf_to_mm(folder / "hf", folder / "mm", layout)
    train = {
        "steps": arguments.steps, "global_batch_size": arguments.batch, "micro_batch_size": arguments.micro_batch,
        "lr": 1e-4, "min_lr": 1e-4, "warmup_fraction": 0,
    }  # fmt: skip
    sections = {
        "model": {"hf_dir": "hf", "load": "mm"},
        "data": {"path": "data/train.json", "seq_length": LONGEST, "pack_length": arguments.pack_length},
        "train": train,
        "output": {"dir": "out", "overwrite": True},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(sections), encoding="utf-8")
    return path


def measure(yaml: Path, arguments: argparse.Namespace) -> dict[str, list[Run]]:
    """Runs by program."""
    lines = {name: _line(yaml, PROGRAMS[name]) for name in arguments.programs if _there(name)}
    if arguments.scaling:
        lines |= {name: _line(yaml, PROGRAMS["ours, packed"], count) for name, count in SCALING.items()}
    names = list(lines)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            runs[name].append(measured(lines[name], yaml.parent / "told.json"))
            print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


def measured(line: Sequence[str], told: Path) -> Run:
    """Run a program.

    Raises:
        subprocess.CalledProcessError: it failed; its last words are printed.
    """
    log = told.with_suffix(".log")
    with log.open("w") as words:
        process = subprocess.Popen(line, stdout=words, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, line)
    steps = json.loads(told.read_text(encoding="utf-8"))
    tokens = sum(steps["tokens"][1:])
    clock, processor = (last - first for first, last in zip(steps["ends"][0], steps["ends"][-1], strict=True))
    return Run(
        tokens_per_second=tokens / clock,
        tokens_per_cpu_second=tokens / processor,
        peak_mib=usage.ru_maxrss / 1024,
        loss=steps["losses"][0],
    )


def print_table(runs: Mapping[str, Sequence[Run]]) -> None:
    """A line for each program: medians, and how many times as fast as Trainer."""
    base = runs.get("Trainer")
    print(f"{'program':20} {'tokens/s':>9} {'x':>6} {'per CPU s':>10} {'x':>6} {'peak MiB':>9} {'first loss':>11}")
    for name, several in runs.items():
        cells = []
        for field, width in (("tokens_per_second", 9), ("tokens_per_cpu_second", 10)):
            value = _median(several, field)
            ratio = f"{value / _median(base, field):6.2f}" if base else f"{'-':>6}"
            cells.append(f"{value:{width}.0f} {ratio}")
        print(f"{name:20} {' '.join(cells)} {_median(several, 'peak_mib'):9.0f} {several[0].loss:11.6f}")


def write_json(target: Path, runs: Mapping[str, Sequence[Run]], arguments: argparse.Namespace) -> None:
    """Write every single run, and what it was taken on."""
    import torch
    import transformers

    machine = {
        "python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count(),
        "torch": torch.__version__, "transformers": transformers.__version__, "trl": _version("trl"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }  # fmt: skip
    kept = {name: value for name, value in vars(arguments).items() if name not in {"output", "folder"}}
    plain = {name: [asdict(run) for run in several] for name, several in runs.items()}
    text = json.dumps({"machine": machine, "settings": kept, "runs": plain}, indent=2)
    target.write_text(text + "\n", encoding="utf-8")


def _median(runs: Sequence[Run] | None, field: str) -> float:
    middle: float = statistics.median(getattr(run, field) for run in runs or ())
    return middle


def _there(name: str) -> bool:
    if name.startswith("TRL") and find_spec("trl") is None:
        print(f"{name} is left out: pip install trl", file=sys.stderr)
        return False
    return True


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(yaml: Path, program: Sequence[str], processes: int = 0) -> list[str]:
    script, (name, *overrides) = Path(__file__).with_name("finetune_programs.py"), program
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(script), name, str(yaml), str(yaml.parent / "told.json"), *overrides]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def number(name: str, default: int, what: str) -> Any:
        return parser.add_argument(name, type=int, default=default, help=f"{what} (default: %(default)s)")

    number("--rounds", 3, "rounds")
    number("--steps", 3, "steps of a program; the first is a warm-up")
    number("--batch", 32, "records of a step")
    number("--micro-batch", 8, "records of a padded micro-batch")
    number("--pack-length", 2 * LONGEST, "longest row in tokens, packed")
    number("--hidden", 512, "width of the model; the vision tower's is half of it")
    number("--layers", 6, "layers of the decoder, and of the tower")
    number("--vocabulary", 16384, "entries of the vocabulary")
    parser.add_argument("--programs", nargs="*", choices=tuple(PROGRAMS), default=tuple(PROGRAMS))
    parser.add_argument("--scaling", action="store_true", help="also one and two processes")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="where the single runs go, as JSON (default: nowhere)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
