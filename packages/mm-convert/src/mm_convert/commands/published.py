"""``mm-convert <Converter> hf_to_mm | mm_to_hf | resplit --cfg.…``, in the published spelling, and their dry run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mm_convert.commands.options import HfToMm, MmToHf, Resplit

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from mm_convert.convert import Conversion, Converter
    from mm_convert.dry_run import Forecast

COMMANDS: dict[str, tuple[type, str]] = {
    "hf_to_mm": (HfToMm, "Hugging Face folder to a new Megatron-style folder"),
    "mm_to_hf": (MmToHf, "Megatron-style folder to a new Hugging Face folder"),
    "resplit": (Resplit, "Megatron-style folder to a new one of another layout"),
}


def build_parser(converter: str, command: str) -> ArgumentParser:
    """The options of one command of one converter: building them all would take as long as a conversion."""
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import PositiveInt

    options, help_text = COMMANDS[command]
    parser = ArgumentParser(
        prog=f"mm-convert {converter} {command}",
        description=help_text,
        # jsonargparse puts one underscore behind it; between a command and its options stand two.
        env_prefix=f"MM_CONVERT_{converter}__{command}_".upper(),
    )
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_argument("--cfg", type=options)
    parser.add_argument("--overwrite", action="store_true", help="replace the target folder")
    parser.add_argument("--resume", action="store_true", help="go on where a run of the same line was broken off")
    parser.add_argument("--workers", type=PositiveInt, help="threads that copy (default: up to 4)")
    parser.add_argument("--plan", action="store_true", help="say what would be done and needed; touch nothing")
    parser.add_argument("--json", action="store_true", help="with --plan: for machines")
    return parser


def run(converter: str, command: str, arguments: Sequence[str], *, plan: bool = False) -> tuple[int, str]:
    """Parse and convert, or plan.

    Returns:
        The exit code, and what was done or would be.
    """
    parser = build_parser(converter, command)
    options = parser.instantiate(parser.parse_args(list(arguments)))
    planning = options.plan or plan
    if options.json and not planning:
        parser.error("--json goes with --plan")
    from mm_convert.convert import Converter

    chosen = Converter.named(converter)
    return 0, _planned(chosen, command, options) if planning else _converted(chosen, command, options)


def _planned(converter: Converter, command: str, options: Any) -> str:
    from mm_convert.dry_run import forecast

    told = forecast(_prepare(converter, command, options.cfg), workers=options.workers)
    return json.dumps(asdict(told), indent=1) if options.json else _forecast_text(told)


def _converted(converter: Converter, command: str, options: Any) -> str:
    cfg = options.cfg
    how = {"overwrite": options.overwrite, "resume": options.resume, "workers": options.workers}
    try:
        if command == "hf_to_mm":
            target = cfg.mm_dir
            made = converter.hf_to_mm(cfg.hf_config.hf_dir, target, cfg.parallel_config.layout(), **how)
        elif command == "mm_to_hf":
            target, given = cfg.save_hf_dir, cfg.parallel_config.given()
            made = converter.mm_to_hf(cfg.mm_dir, cfg.hf_config.hf_dir, target, layout=given, **how)
        else:
            target, layout = cfg.target_dir, cfg.target_parallel_config.layout()
            made = converter.resplit(cfg.source_dir, target, layout, **_source(cfg), **how)
    except KeyboardInterrupt as error:
        left = "the same line goes on from here" if options.resume else "nothing was written"
        raise KeyboardInterrupt(left) from error
    return (
        f"{target}: {len(made.targets)} tensors in {len(made.files())} files from {len(made.sources)} tensors,"
        f" {made.nbytes:,} bytes; every source byte used, every target byte made once"
    )


def _prepare(converter: Converter, command: str, cfg: Any) -> Conversion:
    if command == "hf_to_mm":
        return converter.prepare_hf_to_mm(cfg.hf_config.hf_dir, cfg.mm_dir, cfg.parallel_config.layout())
    if command == "mm_to_hf":
        given = cfg.parallel_config.given()
        return converter.prepare_mm_to_hf(cfg.mm_dir, cfg.hf_config.hf_dir, cfg.save_hf_dir, layout=given)
    layout = cfg.target_parallel_config.layout()
    return converter.prepare_resplit(cfg.source_dir, cfg.target_dir, layout, **_source(cfg))


def _source(cfg: Any) -> dict[str, Any]:
    return {"source": cfg.source_parallel_config.given(), "hf_dir": cfg.hf_config.hf_dir}


def _forecast_text(told: Forecast) -> str:
    kinds = told.tensors
    free = "unknown" if told.disk_free is None else f"{told.disk_free:,}"
    small = told.disk_free is not None and told.disk_bytes > told.disk_free
    lines = [
        f"{told.options['command']}: nothing was written",
        f"reads   {told.source}",
        f"        {told.source_tensors} tensors in {len(told.reads)} files, {told.read_bytes:,} bytes to read",
        f"writes  {told.target} ({told.options['layout']})" + (", which exists: --overwrite" * told.target_exists),
        *(f"        {file}: {f.tensors} tensors, {f.nbytes:,} bytes" for file, f in told.writes.items()),
        f"makes   {sum(kinds.values())} tensors: {kinds['copied']} whole copies, {kinds['cut']} cut out of one tensor,"
        f" {kinds['joined']} joined from pieces",
        "proof   every source byte used, every target byte made once"
        + (f"; {told.compared} ranges stand in several copies, which are compared" * bool(told.compared)),
        f"disk    {told.disk_bytes:,} bytes needed, {free} free" + (": too small" * small),
        f"memory  at most {told.memory_bytes >> 20} MiB with {told.workers} workers",
    ]
    return "\n".join(lines)
