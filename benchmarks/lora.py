"""Does LoRA reach what full training reaches, on the demo's questions?

    OMP_NUM_THREADS=1 python benchmarks/lora.py lora-out --seed 0

From a trained base, as adapters are used: the demo's model learns digits, all of its weights; then it learns
photographs and colours for as many steps, once all of its weights, once adapters alone (rank 32 on every linear layer,
the tower's too). From untrained weights: digits, photographs and colours together, once all weights, once adapters
beside embedding, output layer, patches, merger and norms in full (``modules_to_save``). What a run answered stays in
the folder and is not asked again, so an interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_convert import Converter, Layout
from mm_datafmt import convert
from mm_finetune.mini import make

LANGUAGE = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
ADAPTERS = ("lora.r=32", "lora.alpha=64", "train.lr=2e-3")
EVERYWHERE = (*ADAPTERS, f"lora.target_modules=[{LANGUAGE},visual.*]")
WITH_ENDS = (
    *ADAPTERS,
    f"lora.target_modules=[{LANGUAGE},visual.blocks.*]",
    "lora.modules_to_save=[lm_head,embed_tokens,visual.merger,visual.patch_embed,'*norm','*norm1','*norm2']",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run.

    Attributes:
        data: part of the demo's records.
        base: the run that it goes on from; None: untrained weights.
        settings: besides the demo's own.
    """

    data: str
    base: str | None = None
    settings: tuple[str, ...] = ()


RUNS = {
    "base": Run(data="digits"),
    "full": Run(data="pictures", base="base"),
    "adapters": Run(data="pictures", base="base", settings=EVERYWHERE),
    "full, untrained": Run(data="all"),
    "adapters and ends, untrained": Run(data="all", settings=WITH_ENDS),
}


def main() -> int:
    """Train, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and order")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if not (folder / "mm").is_dir():
        prepare(folder, arguments.seed)
    questions: dict[str, Any] = {}
    for name, run in RUNS.items():
        questions = answered(folder, name, run, arguments)
        told = "  ".join(f"{question} {group['accuracy']:.1%}" for question, group in questions.items())
        print(f"{name:30} {told}", flush=True)
    return 0


def prepare(folder: Path, seed: int) -> None:
    """The demo's folder, its records apart by question, its weights converted for one process."""
    make(folder, seed=seed)
    for part in ("train", "heldout"):
        source = folder / f"data/{part}.llava.json"
        convert(source, folder / f"data/{part}-all.json", image_dir=folder / "data/images")
        records = json.loads((folder / f"data/{part}-all.json").read_text(encoding="utf-8"))
        kinds: dict[str, list[Any]] = {"digits": [], "pictures": []}
        for record in records:
            kinds["digits" if "digit" in record["messages"][0]["content"] else "pictures"].append(record)
        for kind, chosen in kinds.items():
            (folder / f"data/{part}-{kind}.json").write_text(json.dumps(chosen), encoding="utf-8")
    layout = Layout(llm_pp_layers=((4,),), vit_pp_layers=((4,),))
    Converter.named("Qwen2_5_VLConverter").hf_to_mm(folder / "hf", folder / "mm", layout)


def answered(folder: Path, name: str, run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """The share of right answers by question."""
    label = name.replace(" ", "-").replace(",", "")
    answers, out, tuned = (folder / f"{label}{end}" for end in (".json", "", "-hf"))
    if not answers.is_file():
        load = folder / "mm" if run.base is None else folder / run.base / "checkpoint"
        settings = [f"train.steps={arguments.steps}", f"train.seed={arguments.seed}", "parallel.pp_size=1"]
        settings += [f"model.load={load}", f"data.path={folder}/data/train-{run.data}.json", f"output.dir={out}"]
        command("train", folder / "train.yaml", *settings, *run.settings, "output.overwrite=true")
        shutil.rmtree(tuned, ignore_errors=True)
        command("export", out, "--output", tuned, *(["--merge"] if "lora" in "".join(run.settings) else []))
        command("eval", "--hf_dir", tuned, "--data", folder / "data/heldout-all.json", "--output", answers)
    groups: dict[str, Any] = json.loads(answers.read_text(encoding="utf-8"))["groups"]
    return groups


def command(*words: str | Path) -> None:
    """One of mm-finetune's."""
    done = subprocess.run(
        [sys.executable, "-m", "mm_finetune", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"mm-finetune {words[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
