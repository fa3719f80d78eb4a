"""``mm-convert <Converter> hf_to_mm | mm_to_hf --cfg.…``, in the published spelling."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mm_convert.errors import ConvertError
from mm_convert.families import CONVERTERS
from mm_convert.layout import Layout

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mm_convert.convert import Converter
    from mm_convert.plan import Plan


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    """The Hugging Face side.

    Args:
        hf_dir: folder with config.json and safetensors; in mm_to_hf the template of the result.
    """

    hf_dir: str


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The Megatron side.

    Args:
        llm_pp_layers: language layers on each pipeline rank, [[12,16]] or [12,16]; one row for each virtual stage.
        vit_pp_layers: vision layers, in the same shape, 0 where a rank has none: [[32,0]].
        tp_size: tensor-parallel size; must divide num_key_value_heads.
    """

    llm_pp_layers: list[list[int]] | list[int]
    vit_pp_layers: list[list[int]] | list[int]
    tp_size: int = 1

    def layout(self) -> Layout:
        """The layout that these options describe."""
        return Layout(
            llm_pp_layers=self.llm_pp_layers,  # type: ignore[arg-type]  # Layout makes it nested
            vit_pp_layers=self.vit_pp_layers,  # type: ignore[arg-type]
            tp_size=self.tp_size,
        )


@dataclass(frozen=True, kw_only=True)
class HfToMm:
    """Options of hf_to_mm.

    Args:
        mm_dir: folder to write.
        hf_config: the Hugging Face side.
        parallel_config: the Megatron side.
    """

    mm_dir: str
    hf_config: HfConfig
    parallel_config: ParallelConfig


@dataclass(frozen=True, kw_only=True)
class MmToHf:
    """Options of mm_to_hf.

    Args:
        save_hf_dir: folder to write.
        mm_dir: folder to read; its layout is found on disk.
        hf_config: the Hugging Face side.
        parallel_config: the Megatron side, as a check against what is on disk.
    """

    save_hf_dir: str
    mm_dir: str
    hf_config: HfConfig
    parallel_config: ParallelConfig | None = field(default=None)


COMMANDS = {
    "hf_to_mm": (HfToMm, "Hugging Face folder to a new Megatron-style folder"),
    "mm_to_hf": (MmToHf, "Megatron-style folder to a new Hugging Face folder"),
}


def build_parser() -> ArgumentParser:
    """The whole command line."""
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import PositiveInt

    parser = ArgumentParser(prog="mm-convert", description=sys.modules[__name__].__doc__)
    converters = parser.add_subcommands(dest="converter")
    for name, family in CONVERTERS.items():
        converter = ArgumentParser(description=f"Models of type {', '.join(family.model_types)}.")
        converters.add_subcommand(name, converter, help=f"{', '.join(family.model_types)} models")
        commands = converter.add_subcommands(dest="command")
        for command, (options, help_text) in COMMANDS.items():
            sub = ArgumentParser(description=help_text)
            sub.add_argument("--config", action="config", help="a YAML file with these options")
            sub.add_argument("--cfg", type=options)
            sub.add_argument("--overwrite", action="store_true", help="replace the target folder")
            sub.add_argument("--resume", action="store_true", help="go on where a run of the same line was broken off")
            sub.add_argument("--workers", type=PositiveInt, help="threads that copy (default: up to 4)")
            commands.add_subcommand(command, sub, help=help_text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 when done, 2 for bad input, 3 for a defect of ours."""
    resume = False
    try:
        parser = build_parser()
        args = parser.instantiate(parser.parse_args(argv))
        chosen = args[args.converter]
        options = chosen[chosen.command]
        resume = options.resume
        from mm_convert.convert import Converter

        plan, target = _run(Converter.named(args.converter), chosen.command, options)
    except (ConvertError, OSError) as error:
        print(f"mm-convert: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        left = "the same line goes on from here" if resume else "nothing was written"
        print(f"mm-convert: interrupted; {left}", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001  # the edge of the command: a defect of ours, shown whole
        traceback.print_exc()
        return 3
    print(
        f"{target}: {len(plan.targets)} tensors in {len(plan.files())} files from {len(plan.sources)} tensors,"
        f" {plan.nbytes:,} bytes; every source byte used, every target byte made once"
    )
    return 0


def _run(converter: Converter, command: str, options: Namespace) -> tuple[Plan, str]:
    cfg = options.cfg
    parallel = cfg.parallel_config
    how = {"overwrite": options.overwrite, "resume": options.resume, "workers": options.workers}
    if command == "hf_to_mm":
        return converter.hf_to_mm(cfg.hf_config.hf_dir, cfg.mm_dir, parallel.layout(), **how), cfg.mm_dir
    layout = parallel and parallel.layout()
    return converter.mm_to_hf(cfg.mm_dir, cfg.hf_config.hf_dir, cfg.save_hf_dir, layout=layout, **how), cfg.save_hf_dir
