"""The options that share out a video over the processes that torchrun starts."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from wan_infer.errors import RequestError

if TYPE_CHECKING:
    import torch

    from wan_infer.config import TransformerConfig
    from wan_infer.parallel import Alone
    from wan_infer.processes import OneProcess
    from wan_infer.tasks import Size

_SIZES = {"cfg_size": "cfg", "ulysses_size": "ulysses", "ring_size": "ring"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of these options."""
    group = parser.add_argument_group("several processes, started by torchrun (default: the fastest expected split)")
    group.add_argument("--ulysses_size", type=int, help="processes that exchange heads for tokens in self-attention")
    group.add_argument("--ring_size", type=int, help="groups of these, which keys and values go round")
    group.add_argument("--cfg_size", type=int, help="2 computes the two sides of the guidance at the same time")


def check(options: argparse.Namespace) -> None:
    """Refuse sizes that are not those of the processes that were started, before any of them waits for another.

    Raises:
        RequestError: says what fits.
    """
    if not (sizes := _given(options)):
        return
    from wan_infer.parallel import checked_plan
    from wan_infer.processes import processes

    world, product = processes(), math.prod(sizes.values())
    if world == 1 and product > 1:
        flags = " ".join(f"--{name} {getattr(options, name)}" for name in _SIZES if getattr(options, name) is not None)
        raise RequestError(
            f"{flags} is for {product} processes, and this is one; start them with\n"
            f"  torchrun --nproc_per_node={product} -m wan_infer {flags} …"
        )
    checked_plan(world, **sizes)
    if sizes["cfg"] > 1 and options.sample_guide_scale == 1:
        raise RequestError(
            f"--cfg_size is {sizes['cfg']}, and --sample_guide_scale 1 has one side; leave --cfg_size out, or take "
            "another scale"
        )


def parallel(
    options: argparse.Namespace,
    config: TransformerConfig,
    processes: OneProcess,
    arguments: dict[str, Any],
    dtype: torch.dtype,
) -> Alone:
    """Return who computes what; where no size was given, that is chosen here, and said why.

    Args:
        options: of the command.
        config: of the transformer.
        processes: that were started.
        arguments: of a call of the pipeline.
        dtype: of what is exchanged.

    Raises:
        RequestError: the sizes do not fit.
    """
    from wan_infer.parallel import Alone, Parallel, checked_plan, chosen_plan

    if processes.size == 1:
        return Alone()
    if sizes := _given(options):
        plan = checked_plan(processes.size, **sizes)
    else:
        plan, why = chosen_plan(
            processes.size,
            config,
            _tokens(config, arguments["size"], arguments["frames"]),
            guided=arguments["guidance"] != 1,
            bytes_per_element=dtype.itemsize,
        )
        sys.stderr.write(f"{processes.size} processes: {why}; by guessed speeds, so give sizes if you know better\n")
    return Parallel(plan, processes.device)


def _given(options: argparse.Namespace) -> dict[str, int]:
    """The sizes, 1 where one is not given; nothing where none is."""
    sizes = {kind: getattr(options, name) for name, kind in _SIZES.items()}
    if all(size is None for size in sizes.values()):
        return {}
    return {kind: 1 if size is None else size for kind, size in sizes.items()}


def _tokens(config: TransformerConfig, size: Size, frames: int) -> int:
    """How many tokens a video has; the aspect of an image changes it little."""
    latents = ((frames - 1) // 4 + 1, size[1] // 8, size[0] // 8)
    return math.prod(-(-side // of) for side, of in zip(latents, config.patch_size, strict=True))
