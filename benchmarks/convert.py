"""How long does a conversion take, and how much memory, beside `cp -r` and a script that holds the model in memory?

    python benchmarks/convert.py --gigabytes 2 --rounds 5 --output convert.json
    python benchmarks/convert.py --model 7B --rounds 3 --output convert-7b.json

A synthetic Qwen2.5-VL is written: real layer shapes (4 key/value heads, so that tensor parallel 4 is legal), random
bytes, as many layers as the size asks for; with `--model 7B` names, shapes and number of layers of the published one,
16.6 GB. It is converted to one rank-column of four pipeline stages (tp1pp4), to four (tp4pp4), and back. Each
conversion stands beside `cp -r` of the folder it reads, and beside a straightforward script: load every tensor with
torch, cut, torch.save or save_file. Rounds are interleaved; in the first of them, which does not count, the script's
tensors and mm-convert's are compared. Memory is the peak of the process (mapped pages that it touched included), from
the operating system. The script is left out where the model would not fit into memory twice, as it needs it; then
`mm-convert verify` compares what came back with what was there.

With `--cache cold` the read files are dropped from the page cache before each run (clean pages only, which is why
everything is synced before); the default is warm. Three times the size is needed as free disk space, in `--folder`;
with the script, four times.

At the end, commands that read headers alone: help, and the dry run for the headers of a published 72B model (80 layers,
every byte a hole in a sparse file), from the start of the process to its end.
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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

CONVERTER = "Qwen2_5_VLConverter"
STAGES, GROUPS, VISION_HEADS, SHARD = 4, 4, 16, 4_000_000_000
# hidden, heads, head, ffn of the published language models (7B, 3B, 1.5B; with 4 key/value heads), vision hidden and
# ffn; the last row is for trying the script out.
WIDTHS = (
    (3584, 28, 128, 18944, 1280, 3420),
    (2048, 16, 128, 11008, 1280, 3420),
    (1536, 12, 128, 8960, 1280, 3420),
    (256, 4, 64, 704, 128, 344),
)
DEPTH, VISION, HEAD = 32, 1280, 128
# Peak of the script beside the size of the model, measured; with a little room.
SCRIPT_MEMORY = 2.2
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """Numbers of a published Qwen2.5-VL, from its config.json."""

    hidden: int
    heads: int
    groups: int
    layers: int
    ffn: int
    vocabulary: int
    vision_ffn: int


PUBLISHED = {
    "7B": Published(3584, 28, 4, 28, 18944, 152064, 3420),
    "72B": Published(8192, 64, 8, 80, 29568, 152064, 3456),
}


@dataclass(frozen=True)
class Run:
    """One measured process."""

    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Task:
    """One conversion: what mm-convert and the script are told, and the folders it reads and makes."""

    name: str
    reads: Path
    makes: Path
    ours: Sequence[str]
    theirs: Sequence[str]


def main() -> int:
    """Measure, print a table, write JSON; the exit code is 2 when a command fails, 1 when the results differ."""
    arguments = _parse()
    if arguments.child:
        return CHILDREN[arguments.child[0]](*arguments.child[1:])
    shapes, depths = published(arguments.model) if arguments.model else model(int(arguments.gigabytes * 1e9))
    nbytes = 2 * sum(map(prod, shapes.values()))
    script = SCRIPT_MEMORY * nbytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.folder))
    try:
        check_space(folder, (4 if script else 3) * nbytes)
        write_model(folder / "hf", shapes, depths)
        runs = measure(
            folder, depths, arguments.rounds, cold=arguments.cache == "cold", script=script, fsync=arguments.fsync
        )
        shutil.rmtree(folder / "hf")
        runs |= {"headers alone": measure_headers(folder / "72B", arguments.rounds)}
    except subprocess.CalledProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if error.returncode != 1 else 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not script:
        print(f"no in-memory script: it would need {SCRIPT_MEMORY * nbytes / 1e9:.0f} GB of memory")
    print_table(runs, nbytes, arguments.cache)
    if arguments.output is not None:
        write_json(arguments.output, runs, nbytes, arguments.cache)
    return 0


def model(nbytes: int) -> tuple[Shapes, tuple[int, int]]:
    """Shapes of a bf16 model of about this size, and its depths (language, vision): the widest with a few layers."""
    for hidden, heads, head, ffn, vision, vision_ffn in WIDTHS:
        layer, block = _layer(hidden, heads, head, ffn), _block(vision, vision_ffn)
        layer_bytes, block_bytes = (2 * sum(map(prod, shapes.values())) for shapes in (layer, block))
        blocks = min(32, max(1, round(0.08 * nbytes / block_bytes)))
        vocabulary = min(152064, max(256, int(0.065 * nbytes / (2 * hidden)) // 64 * 64))
        layers = (nbytes - blocks * block_bytes - 4 * vocabulary * hidden) / layer_bytes
        if layers >= STAGES - 1:
            break
    depth = max(STAGES, round(layers))
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), **_ends(hidden, vision)}
    shapes |= {f"visual.blocks.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(depth) for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}, (depth, blocks)


def published(name: str) -> tuple[Shapes, tuple[int, int]]:
    """Shapes of a published model, and its depths (language, vision)."""
    n = PUBLISHED[name]
    shapes: Shapes = {"model.embed_tokens.weight": (n.vocabulary, n.hidden), **_ends(n.hidden, VISION)}
    block, layer = _block(VISION, n.vision_ffn), _layer(n.hidden, n.heads, HEAD, n.ffn, n.groups)
    shapes |= {f"visual.blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in block.items()}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(n.layers) for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (n.hidden,), "lm_head.weight": (n.vocabulary, n.hidden)}, (n.layers, DEPTH)


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError unless so many bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder.parent} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed: see --folder")


def write_model(
    directory: Path, shapes: Shapes, depths: tuple[int, int], *, groups: int = GROUPS, holes: bool = False
) -> None:
    """Write a Hugging Face folder of random bytes or of holes, in shards of at most 4 GB and at least two."""
    directory.mkdir(parents=True)
    config = {
        "model_type": "qwen2_5_vl",
        "num_hidden_layers": depths[0],
        "num_key_value_heads": groups,
        "vision_config": {"depth": depths[1], "num_heads": VISION_HEADS},
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    total = 2 * sum(map(prod, shapes.values()))
    limit = min(SHARD, total // 2 + 1)
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(map(prod, (*shards[-1].values(), shape))) > limit and shards[-1]:
            shards.append({})
        shards[-1][name] = shape
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, shard, holes=holes)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(
    folder: Path, depths: tuple[int, int], rounds: int, *, cold: bool, script: bool, fsync: bool
) -> dict[str, dict[str, list[Run]]]:
    """Runs by task and program; a first round checks the results and does not count."""
    runs: dict[str, dict[str, list[Run]]] = {}
    scratch = folder / "scratch"
    for number in range(rounds + 1):
        for task in tasks(folder, depths):
            lines = {"cp -r": ["cp", "-r", str(task.reads), str(scratch)], "mm-convert": task.ours}
            lines |= {"mm-convert --fsync": [*task.ours, "--fsync"]} if fsync else {}
            lines |= {"in-memory script": task.theirs} if script else {}
            for program, line in lines.items():
                if program == "mm-convert --fsync":
                    shutil.rmtree(task.makes)
                run = measured(line, task.reads, cold=cold)
                if number == 0 and program == "in-memory script":
                    _child("compare", str(task.makes), str(scratch))
                elif number == 0 and program == "mm-convert" and not script and task.makes.name == "back":
                    subprocess.run([_COMMAND, "verify", str(folder / "hf"), str(task.makes)], check=True)
                shutil.rmtree(scratch, ignore_errors=True)
                if number > 0:
                    runs.setdefault(task.name, {}).setdefault(program, []).append(run)
            shutil.rmtree(task.makes)
    return runs


def tasks(folder: Path, depths: tuple[int, int]) -> Iterable[Task]:
    """The conversions, each when its input is there."""
    hf, scratch = folder / "hf", folder / "scratch"
    llm, vit = (_even(depths[0]), [depths[1]] + [0] * (STAGES - 1))
    for tp in (1, 4):
        mm, back = folder / "mm", folder / "back"
        layout = [json.dumps([counts], separators=(",", ":")) for counts in (llm, vit)]
        there = [
            *_mm_convert("hf_to_mm"),
            *("--cfg.mm_dir", str(mm), "--cfg.hf_config.hf_dir", str(hf)),
            *("--cfg.parallel_config.llm_pp_layers", layout[0], "--cfg.parallel_config.vit_pp_layers", layout[1]),
            *("--cfg.parallel_config.tp_size", str(tp)),
        ]
        yield Task(f"hf_to_mm tp{tp}pp{STAGES}", hf, mm, there, _line("hf_to_mm", hf, scratch, *layout, tp))
        subprocess.run(there, check=True, stdout=subprocess.DEVNULL)
        again = [
            *_mm_convert("mm_to_hf"),
            *("--cfg.mm_dir", str(mm), "--cfg.hf_config.hf_dir", str(hf), "--cfg.save_hf_dir", str(back)),
        ]
        yield Task(f"mm_to_hf tp{tp}pp{STAGES}", mm, back, again, _line("mm_to_hf", mm, hf, scratch))
        shutil.rmtree(mm)


def measure_headers(folder: Path, rounds: int) -> dict[str, list[Run]]:
    """Runs of the commands that read headers alone; the first of each does not count."""
    shapes, depths = published("72B")
    write_model(folder / "hf", shapes, depths, groups=PUBLISHED["72B"].groups, holes=True)
    lines = {"mm-convert --help": [_COMMAND, "--help"], "hf_to_mm --help": [*_mm_convert("hf_to_mm"), "--help"]}
    for tp, stages in ((1, 4), (2, 8), (8, 8)):
        llm = [depths[0] // stages] * stages
        lines[f"plan 72B tp{tp}pp{stages}"] = [
            *(_COMMAND, "plan", *_mm_convert("hf_to_mm")[1:]),
            *("--cfg.mm_dir", str(folder / "mm"), "--cfg.hf_config.hf_dir", str(folder / "hf")),
            *("--cfg.parallel_config.llm_pp_layers", str([llm]).replace(" ", "")),
            *("--cfg.parallel_config.vit_pp_layers", str([[depths[1]] + [0] * (stages - 1)]).replace(" ", "")),
            *("--cfg.parallel_config.tp_size", str(tp)),
        ]
    nowhere = folder / "nowhere"
    return {name: [measured(line, nowhere, cold=False) for _ in range(rounds + 1)][1:] for name, line in lines.items()}


def measured(line: Sequence[str], reads: Path, *, cold: bool) -> Run:
    """Wall time and peak memory of a process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    os.sync()
    for path in filter(Path.is_file, reads.rglob("*")):
        _set_cache(path, cold=cold)
    started = time.perf_counter()
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, line)
    return Run(seconds=seconds, peak_mib=usage.ru_maxrss / 1024)


def print_table(runs: Mapping[str, Mapping[str, Sequence[Run]]], nbytes: int, cache: str) -> None:
    """A line for each task and program: medians, and how many times cp's."""
    print(f"{nbytes / 1e9:.2f} GB, page cache {cache}")
    print(f"{'task':18} {'program':18} {'seconds':>8} {'x cp':>6} {'GB/s':>6} {'peak MiB':>9}")
    for task, programs in runs.items():
        cp = programs.get("cp -r")
        for program, measured_runs in programs.items():
            seconds = statistics.median(run.seconds for run in measured_runs)
            peak = max(run.peak_mib for run in measured_runs)
            beside = f"{seconds / statistics.median(run.seconds for run in cp):6.1f}" if cp else f"{'':6}"
            speed = f"{nbytes / 1e9 / seconds:6.2f}" if cp else f"{'':6}"
            print(f"{task:18} {program:18} {seconds:8.2f} {beside} {speed} {peak:9.0f}")


def write_json(target: Path, runs: Mapping[str, Mapping[str, Sequence[Run]]], nbytes: int, cache: str) -> None:
    """Write every single run, and what it was taken on."""
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    plain = {task: {name: [asdict(r) for r in rs] for name, rs in programs.items()} for task, programs in runs.items()}
    text = json.dumps({"machine": machine, "bytes": nbytes, "cache": cache, "runs": plain}, indent=2)
    target.write_text(text + "\n", encoding="utf-8")


def in_memory_hf_to_mm(hf_dir: str, mm_dir: str, llm: str, vit: str, tp: str) -> int:
    """The script: everything is loaded, cut by torch, saved a rank at a time."""
    import torch
    from safetensors.torch import load_file

    from mm_convert import Converter, HuggingFaceFolder, Layout, assemble
    from mm_convert.convert import rank_sections

    hf = HuggingFaceFolder.open(hf_dir)
    layout = Layout(llm_pp_layers=json.loads(llm), vit_pp_layers=json.loads(vit), tp_size=int(tp))
    plan = Converter.named(CONVERTER).plan_hf_to_mm(hf, layout)
    held = {name: tensor for file in hf.files for name, tensor in load_file(Path(hf_dir) / file).items()}
    ranks: dict[str, dict[str, dict[str, torch.Tensor]]] = {
        file: {section: {} for section in sections} for file, sections in rank_sections(layout).items()
    }
    for ref in plan.targets:
        ranks[ref.file][ref.section][ref.name] = assemble(
            plan, ref, lambda s: held[s.source.name].narrow(s.dim, s.source_start, s.length)
        )
    for file, content in ranks.items():
        path = Path(mm_dir) / "release" / file
        path.parent.mkdir(parents=True)
        torch.save({**content, "checkpoint_version": 3.0}, path)
    (Path(mm_dir) / "latest_checkpointed_iteration.txt").write_text("release")
    return 0


def in_memory_mm_to_hf(mm_dir: str, hf_dir: str, save_dir: str) -> int:
    """The script, the other way."""
    import torch
    from safetensors.torch import save_file

    from mm_convert import Converter, HuggingFaceFolder, MegatronFolder, assemble

    mm, hf = MegatronFolder.open(mm_dir), HuggingFaceFolder.open(hf_dir)
    plan = Converter.named(CONVERTER).plan_mm_to_hf(mm, hf)
    held = {file: torch.load(mm.directory / file, weights_only=True) for file in mm.files}
    made = {
        ref: assemble(
            plan,
            ref,
            lambda s: held[s.source.file][s.source.section][s.source.name].narrow(s.dim, s.source_start, s.length),
        )
        for ref in plan.targets
    }
    Path(save_dir).mkdir()
    for file, refs in plan.files().items():
        save_file({ref.name: made[ref] for ref in refs}, Path(save_dir) / file, metadata={"format": "pt"})
    return 0


def compare(ours: str, theirs: str) -> int:
    """1, and a message, unless both folders hold the same tensors."""
    import torch
    from safetensors.torch import load_file

    for path in sorted(Path(theirs).rglob("*")):
        other = Path(ours) / path.relative_to(theirs)
        if path.suffix == ".safetensors":
            held, expected = {"": load_file(other)}, {"": load_file(path)}
        elif path.suffix == ".pt":
            held, expected = (torch.load(p, weights_only=True, mmap=True) for p in (other, path))
        else:
            continue
        for section, tensors in expected.items():
            same = held[section] == tensors if not isinstance(tensors, dict) else _equal(held[section], tensors)
            if not same:
                print(f"error: {other} and {path} differ", file=sys.stderr)
                return 1
    return 0


_COMMAND = str(Path(sys.executable).parent / "mm-convert")
CHILDREN: dict[str, Callable[..., int]] = {
    "hf_to_mm": in_memory_hf_to_mm,
    "mm_to_hf": in_memory_mm_to_hf,
    "compare": compare,
}


def _equal(ours: Mapping[str, object], theirs: Mapping[str, object]) -> bool:
    import torch

    return ours.keys() == theirs.keys() and all(
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(ours.values(), (theirs[name] for name in ours), strict=True)
    )


def _layer(hidden: int, heads: int, head: int, ffn: int, groups: int = GROUPS) -> Shapes:
    rows = {"q": heads * head, "k": groups * head, "v": groups * head}
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{p}_proj.weight": (n, hidden) for p, n in rows.items()},
        **{f"self_attn.{p}_proj.bias": (n,) for p, n in rows.items()},
        "self_attn.o_proj.weight": (hidden, heads * head),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }


def _block(hidden: int, ffn: int) -> Shapes:
    rows = {"attn.qkv": 3 * hidden, "attn.proj": hidden, "mlp.gate_proj": ffn, "mlp.up_proj": ffn}
    return {
        "norm1.weight": (hidden,),
        "norm2.weight": (hidden,),
        **{f"{name}.weight": (n, hidden) for name, n in rows.items()},
        **{f"{name}.bias": (n,) for name, n in rows.items()},
        "mlp.down_proj.weight": (hidden, ffn),
        "mlp.down_proj.bias": (hidden,),
    }


def _ends(hidden: int, vision: int) -> Shapes:
    merged = 4 * vision
    return {
        "visual.patch_embed.proj.weight": (vision, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (vision,),
        "visual.merger.mlp.0.weight": (merged, merged),
        "visual.merger.mlp.0.bias": (merged,),
        "visual.merger.mlp.2.weight": (hidden, merged),
        "visual.merger.mlp.2.bias": (hidden,),
    }


def _write_shard(path: Path, shapes: Shapes, *, holes: bool) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + 2 * prod(shape)]}
        position += 2 * prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # A pool of odd length, again and again: no tensor equals another, and writing is all it costs.
    pool = os.urandom((4 << 20) + 13)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if holes:
            file.truncate(file.tell() + position)
        while position and not holes:
            position -= file.write(pool[:position])


def _set_cache(path: Path, *, cold: bool) -> None:
    with path.open("rb") as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 20):
                pass


def _even(layers: int) -> list[int]:
    return [layers // STAGES + (stage < layers % STAGES) for stage in range(STAGES)]


def _mm_convert(command: str) -> list[str]:
    return [_COMMAND, CONVERTER, command]


def _line(*words: object) -> list[str]:
    return [sys.executable, __file__, "--child", *map(str, words)]


def _child(*words: str) -> None:
    subprocess.run(_line(*words), check=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gigabytes", type=float, default=0.5, help="size of the model (default: %(default)s)")
    which.add_argument("--model", choices=("7B",), help="a published model's shapes, all of them: 16.6 GB")
    parser.add_argument("--rounds", type=_positive, default=3, help="rounds that count (default: %(default)s)")
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm", help="page cache (default: %(default)s)")
    parser.add_argument("--fsync", action="store_true", help="mm-convert with --fsync as well")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="where the single runs go, as JSON (default: nowhere)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is expected")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
