"""``mm-finetune check``: one batch through everything without training; on one process, or on many under torchrun."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mm_finetune.commands.train import leave_it_to_the_first, notes

if TYPE_CHECKING:
    from mm_finetune.config import PreferenceConfig
    from mm_finetune.training import PreparedRun
    from mm_finetune.trial import Trial


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", type=Path, help="YAML file, as for train")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example parallel.tp_size=2")


def run(args: argparse.Namespace) -> int:
    """Check, try, tell. Weights stay as they are, and nothing is written but the cache of the data set's lengths."""
    from mm_finetune.config import load_config
    from mm_finetune.errors import FinetuneError
    from mm_finetune.launch import process_rank

    rank, world_size = process_rank()
    try:
        config = load_config(args.config, args.overrides)
        from mm_finetune.trial import prepared, try_out

        checked = prepared(config, world_size=world_size)
    except (FinetuneError, OSError) as error:
        return leave_it_to_the_first(rank, error)
    if rank == 0:
        sys.stdout.write(f"{before(checked)}\n")
        sys.stdout.flush()
    trial = try_out(checked)
    if rank == 0:
        sys.stdout.write(f"{after(checked, trial)}\n")
    return 0


def before(run: PreparedRun) -> str:
    """What is known without a step: what trains, the data, its first record."""
    from mm_finetune.preview import histogram, preview

    index, config = run.dataset.index, run.config
    first = int(index.usable[0])
    sample = run.dataset.encode(first, pixels=False)
    lines = [
        "weights",
        _indented(_trainable(run)),
        f"data: {index.described()}",
        *(f"  record {fault.record}: {fault.message}" for fault in index.faults[:3]),
        *(f"  {note}" for note in notes(run)),
        "  tokens of a record",
        histogram(index),
        f"record {first} as the model sees it ({'packed' if config.data.packing else 'padded'} rows)",
        preview(sample, run.dataset.encoder.tokenizer),
    ]
    return "\n".join(lines)


def after(run: PreparedRun, trial: Trial) -> str:
    """What the batch showed."""
    from mm_finetune.planning import words

    rows = [["stage", "of a device", "planned", "measured", ""]]
    for one in trial.memory:
        planned = one.planned
        passes = max(planned.activations + planned.moment, planned.step if one.passes < planned.step else 0)
        for name, said, found in (
            ("weights", planned.weights, one.weights),
            ("gradients", planned.gradients, one.gradients),
            ("forward and backward", passes, one.passes),
        ):
            ratio = f"{said / found - 1:+.1%}" if found else ""
            rows.append([str(one.stage), name, words.size(said), words.size(found), ratio])
        rows.append([str(one.stage), "optimizer", words.size(planned.optimizer), "", "made in the first step"])
        rows.append([str(one.stage), "at most", words.size(planned.total), "", ""])
    parts = [
        f"layout: {words.layout_words(trial.layout, run.config.train.recompute)}",
        "memory",
        _indented(words.columns(rows)),
        f"first batch: loss {trial.loss:.4f}, {trial.tokens} tokens, {trial.seconds:.1f} s forwards and backwards;"
        " the weights were not changed",
    ]
    if run.config.preference:
        parts.append(_preference(run.config.preference, trial))
    return "\n".join(parts)


def _preference(config: PreferenceConfig, trial: Trial) -> str:
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in trial.values.items())
    if config.reference_free:
        return f"  {config.loss} without a reference: {numbers}"
    # The losses of a margin of 0, see mm_finetune.config.PreferenceConfig.
    start = {"dpo": "ln 2 = 0.6931", "hinge": "1", "ipo": f"1 / (2 beta)^2 = {1 / (2 * config.beta) ** 2:.4g}"}
    more = f", plus {config.sft_weight:g} times the chosen answers' loss" if config.sft_weight else ""
    return (
        f"  {config.loss}: before the first step the model is its own reference, so every margin is 0 and the loss of a"
        f" pair is {start[config.loss]}{more}\n  {numbers}"
    )


def _trainable(run: PreparedRun) -> str:
    from math import prod

    from mm_finetune.selection import adapted_layers, rates_of, saved_layers, trainable_table

    config, shapes = run.config, run.checkpoint.shapes
    rates = rates_of(list(shapes), freeze=config.train.freeze, lr_scale=config.train.lr_scale)
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    if config.lora is None:
        return trainable_table(sizes, rates)
    saved = saved_layers(shapes, config.lora.modules_to_save)
    layers = adapted_layers(shapes, config.lora.target_modules, saved)
    adapters = {f"{layer}.adapter": config.lora.r * sum(shapes[f"{layer}.weight"]) for layer in layers}
    adapted = {f"{layer}.adapter": rates[f"{layer}.weight"] for layer in layers}
    in_full = {name: rate * (name.rpartition(".")[0] in saved) for name, rate in rates.items()}
    return trainable_table(sizes | adapters, in_full | adapted)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
