"""``mm-finetune plan``: memory for each device of a layout, and the layout to choose, without torch or a data set."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_convert import Layout as MegatronLayout
    from mm_finetune.config import TrainConfig
    from mm_finetune.planning.architecture import Architecture
    from mm_finetune.planning.load import Load
    from mm_finetune.planning.memory import Layout
    from mm_finetune.planning.weights import Training

DEFAULT_GIB = 64.0  # Atlas 800T A2, Ascend 910B
SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", type=Path, help="YAML file, as for train; model.load and data.path need not exist")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example parallel.tp_size=2")
    parser.add_argument("--world_size", type=int, metavar="N", help="devices (default: those of one tp x pp)")
    parser.add_argument(
        "--device_memory", type=float, default=DEFAULT_GIB, metavar="GIB", help="of each (default: %(default)g)"
    )
    parser.add_argument(
        "--device", choices=("npu", "cuda", "cpu"), default="npu", help="whose kernels are counted (default: npu)"
    )
    parser.add_argument(
        "--picture_share", type=float, default=0.5, metavar="SHARE",
        help="of the tokens, where the data set is not there (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="show every layout that is possible")
    parser.add_argument("--json", action="store_true", help="print values for machines, bytes")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from mm_finetune.config import load_config
    from mm_finetune.errors import ConfigError
    from mm_finetune.planning.activations import KERNELS
    from mm_finetune.planning.architecture import Architecture
    from mm_finetune.planning.layouts import candidates, chosen, micro_batches
    from mm_finetune.planning.memory import predict
    from mm_finetune.planning.pictures import assumed, load_of, looked_at
    from mm_finetune.planning.weights import Training

    config = load_config(args.config, args.overrides)
    if not 0 <= args.picture_share <= 1:
        raise ConfigError(f"--picture_share is {args.picture_share}; it must lie between 0 and 1")
    if not args.device_memory > 0:
        raise ConfigError(f"--device_memory is {args.device_memory}; it must be above 0")
    if args.world_size is not None and args.world_size < 1:
        raise ConfigError(f"--world_size is {args.world_size}; it must be 1 or more")
    devices = args.world_size or config.parallel.tp_size * config.parallel.pp_size
    dp_size = config.data_parallel_size(devices)
    architecture = Architecture.read(config.model.hf_dir)
    training, kernels = Training.of(config, architecture), KERNELS[args.device]
    merge = architecture.vision.merge
    pictures = looked_at(config, merge) or assumed(config, args.picture_share, merge)
    load = load_of(config, pictures, dp_size, micro_batches(config, dp_size))
    layout = configured_layout(config, architecture, training, load, dp_size)
    stages = predict(architecture, training, layout, load, kernels)
    found = candidates(config, architecture, training, load, kernels, devices)
    device_bytes = args.device_memory * (1 << 30)
    best = chosen(found, device_bytes)
    from mm_finetune.planning import words

    if args.json:
        told = {
            "configured": words.as_values(layout, training.recompute, stages),
            "chosen": best and words.as_values(best.layout, best.recompute, best.stages),
        }
        sys.stdout.write(json.dumps(told) + "\n")
        return 0
    lines = [
        f"{_model_words(architecture, training)}; {load.rows} x {load.length} tokens and {load.patches} patches a"
        f" micro-batch, {load.micro_batches} of them a step; pictures {pictures.source}",
        "",
        f"configured: {words.layout_words(layout, training.recompute)}; a device of each stage holds",
        words.stages_table(layout, stages),
        "",
        words.choice_words(found, best, device_bytes),
        "",
        words.candidates_table(found, device_bytes, best, len(found) if args.all else SHOWN),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def configured_layout(
    config: TrainConfig, architecture: Architecture, training: Training, load: Load, dp_size: int
) -> Layout:
    """The layout of a run: its layers as ``model.load`` has them, or dealt out evenly where that is not there."""
    from mm_finetune.planning.dealing import dealt, vision_tp_size
    from mm_finetune.planning.memory import Layout

    parallel = config.parallel
    tp_size = parallel.tp_size
    if found := _converted(config):
        llm, vit, vit_tp_size = found.llm_pp_layers, found.vit_pp_layers, found.tp("vit")
    else:
        vit_tp_size = vision_tp_size(architecture, tp_size)
        copies = tp_size // vit_tp_size
        llm, vit = dealt(architecture, training, load, parallel.pp_size, parallel.vpp_size, copies)[-1]
    return Layout(
        tp_size=tp_size,
        sequence_parallel=parallel.sequence_parallel and tp_size > 1,
        llm_pp_layers=llm,
        vit_pp_layers=vit,
        vit_tp_size=vit_tp_size,
        dp_size=dp_size,
    )


def _converted(config: TrainConfig) -> MegatronLayout | None:
    """The layout of ``model.load``, where that is there and cut as the run is."""
    from mm_convert import ConvertError, MegatronFolder

    try:
        layout = MegatronFolder.open(config.model.load).layout
    except ConvertError:
        return None
    found, asked = (
        (sizes.tp_size, sizes.pp_size, sizes.vpp_size) for sizes in (layout, config.parallel)
    )  # fmt: skip
    # A shorter list of vision layers is repeated along the pipeline, which training refuses.
    return layout if found == asked and len(layout.vit_pp_layers[0]) == layout.pp_size else None


def _model_words(architecture: Architecture, training: Training) -> str:
    from math import prod

    shapes = architecture.shapes()
    total = sum(prod(shape) for shape in shapes.values())
    if training.adapters:
        adapted = sum(
            rank * sum(shapes[f"{layer}.weight"][:2]) for layer, rank in training.adapters.items()
        )  # fmt: skip
        words = f"{adapted:,} in adapters on {len(training.adapters)} layers train"
    else:
        trained = sum(prod(shape) for name, shape in shapes.items() if training.trains(name))
        words = "all train" if trained == total else f"{trained:,} train"
    return f"{architecture.model_type}: {total:,} weights, {words}"
