"""``mm-convert <Converter> hf_to_mm | mm_to_hf | resplit --cfg.…``, in the published spelling, and their dry run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mm_convert.commands import adapters, distributed, verbs
from mm_convert.commands.generative import GenerativeHfToMm, GenerativeMmToHf, GenerativeResplit
from mm_convert.commands.options import HfToMm, MmToHf, Resplit
from mm_convert.commands.spelling import with_cfg
from mm_convert.errors import ModelError
from mm_convert.families import CONVERTERS
from mm_convert.vocabulary import DROPPED

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from mm_convert.convert import Conversion
    from mm_convert.dry_run import Forecast

HELP = {
    "hf_to_mm": "Hugging Face folder to a new Megatron-style folder",
    "hf_to_mm_ldt": "the same, with embedding and output layer on pipeline rank 0 (LDT)",
    "mm_to_hf": "Megatron-style folder to a new Hugging Face folder",
    "resplit": "Megatron-style folder to a new one of another layout",
    "source_to_mm": "a model of the original release, which is one file, to a new Megatron-style folder",
    **adapters.HELP,
    **distributed.HELP,
}
# What reads Hugging Face tensors may leave some over.
LEAVES_OVER = {"hf_to_mm", "source_to_mm", "hf_to_mm_ldt", "mm_to_hf", *adapters.HELP}
VERSIONS = {"HunyuanVideoConverter": ("t2v", "i2v"), "CogVideoConverter": ("t2v", "i2v")}
Command = tuple[type, Callable[..., "Conversion"]]
"""A command's options, and what plans it."""

UNDERSTANDING: dict[str, Command] = {
    "hf_to_mm": (HfToMm, verbs.hf_to_mm),
    "hf_to_mm_ldt": (HfToMm, verbs.hf_to_mm_ldt),
    "mm_to_hf": (MmToHf, verbs.mm_to_hf),
    "resplit": (Resplit, verbs.resplit),
}
GENERATIVE: dict[str, Command] = {
    "hf_to_mm": (GenerativeHfToMm, verbs.generative_hf_to_mm),
    "mm_to_hf": (GenerativeMmToHf, verbs.generative_mm_to_hf),
    "resplit": (GenerativeResplit, verbs.generative_resplit),
}


def converters() -> dict[str, str]:
    """The published names, and what each is for."""
    about = {name: family.class_names or family.model_types for name, family in CONVERTERS.items()}
    return {name: f"{', '.join(models)} models" for name, models in about.items()} | {
        name: "models as FSDP2 trainers hold them" for name in distributed.PREFIXES if name not in CONVERTERS
    }


def without_version(converter: str, words: Sequence[str]) -> list[str]:
    """The words after a converter's name, without ``--version t2v`` in front: tensors tell which version they are of.

    Raises:
        ModelError: no such version.
    """
    versions = VERSIONS.get(converter, ())
    if not versions or not words or not words[0].startswith("--version"):
        return list(words)
    given = words[0].partition("=")[2] or "".join(words[1:2])
    if given not in versions:
        raise ModelError(f"--version {given!r}; {converter} has: {', '.join(versions)}")
    return list(words[1 if "=" in words[0] else 2 :])


def commands(converter: str) -> Mapping[str, Command]:
    """The commands of a converter."""
    if converter not in CONVERTERS:
        return {name: distributed.COMMANDS[name] for name in distributed.FSDP2}
    generative = CONVERTERS[converter].generative
    if generative and CONVERTERS[converter].original_config:
        # No adapter of these is published in a form that says what it belongs to.
        return GENERATIVE | {"source_to_mm": GENERATIVE["hf_to_mm"]}
    own = GENERATIVE if generative else UNDERSTANDING | distributed.COMMANDS
    if not CONVERTERS[converter].unfusable:
        return own
    lora = adapters.GENERATIVE if generative else adapters.UNDERSTANDING
    return own | {name: (options, verbs.of_its_own) for name, options in lora.items()}


def build_parser(converter: str, command: str) -> ArgumentParser:
    """The options of one command of one converter: building them all would take as long as a conversion."""
    from jsonargparse.typing import PositiveInt

    from mm_convert.commands.parser import CommandParser

    parser = CommandParser(
        prog=f"mm-convert {converter} {command}",
        description=HELP[command],
        # jsonargparse puts one underscore behind it; between a command and its options stand two.
        env_prefix=f"MM_CONVERT_{converter}__{command}_".upper(),
    )
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_argument("--cfg", type=commands(converter)[command][0])
    if command == "mm_to_hf":
        spellings = ["template", *CONVERTERS[converter].spellings]
        parser.add_argument(
            "--hf_naming", choices=spellings, default="template", help="how tensors are named; as in hf_dir, or so"
        )
    if command in LEAVES_OVER:
        parser.add_argument(
            "--allow-unused",
            action="append",
            default=[],
            metavar="PATTERN",
            help="Hugging Face tensors that may be left over, as in --allow-unused 'talker.*'; may be repeated;"
            " mm_to_hf takes them from hf_dir",
        )
    parser.add_argument("--overwrite", action="store_true", help="replace the target folder")
    parser.add_argument("--resume", action="store_true", help="go on where a run of the same line was broken off")
    parser.add_argument("--workers", type=PositiveInt, help="threads that copy (default: up to 4)")
    parser.add_argument("--ram-cap", type=int | str, metavar="SIZE", help="what their buffers may take: 64MiB")
    parser.add_argument("--fsync", action="store_true", help="have all on the disk before the folder appears")
    parser.add_argument("--plan", action="store_true", help="say what would be done and needed; touch nothing")
    parser.add_argument("--json", action="store_true", help="with --plan: for machines")
    return parser


def run(converter: str, command: str, arguments: Sequence[str], *, plan: bool = False) -> tuple[int, str]:
    """Parse and convert, or plan.

    Returns:
        The exit code, and what was done or would be.
    """
    parser = build_parser(converter, command)
    options = parser.instantiate(parser.parse_args(with_cfg(converter, command, arguments)))
    planning = options.plan or plan
    if options.json and not planning:
        parser.error("--json goes with --plan")
    ram_cap = _ram_cap(parser, options.ram_cap)
    from mm_convert.convert import Converter

    prepare = commands(converter)[command][1]
    known = Converter.named(converter) if converter in CONVERTERS else None
    conversion = prepare(known, options.cfg, options)
    return 0, (_planned if planning else _converted)(conversion, options, ram_cap)


def _ram_cap(parser: ArgumentParser, given: int | str | None) -> int | None:
    """Bytes."""
    from mm_convert.memory import parse_size

    try:
        return None if given is None else parse_size(given)
    except ValueError as error:
        parser.error(f"--ram-cap: {error}")
    return None


def _planned(conversion: Conversion, options: Any, ram_cap: int | None) -> str:
    from mm_convert.dry_run import forecast

    told = forecast(conversion, workers=options.workers, ram_cap=ram_cap)
    return json.dumps(asdict(told), indent=1) if options.json else _forecast_text(told)


def _converted(conversion: Conversion, options: Any, ram_cap: int | None) -> str:
    try:
        made = conversion.run(
            overwrite=options.overwrite,
            resume=options.resume,
            workers=options.workers,
            ram_cap=ram_cap,
            fsync=options.fsync,
        )
    except KeyboardInterrupt as error:
        left = "the same line goes on from here" if options.resume else "nothing was written"
        raise KeyboardInterrupt(left) from error
    unused = len(conversion.target.options.get("unused", ()))
    return (
        f"{conversion.target.directory}: {len(made.targets)} tensors in {len(made.files())} files from"
        f" {len(made.sources)} tensors of {conversion.source}, {made.nbytes:,} bytes; every source byte used, every"
        f" target byte made once"
        + f"; {unused} tensors {_fate(conversion.target.options)}" * bool(unused)
        + _dropped(conversion.target.options)
    )


def _dropped(options: Mapping[str, Any]) -> str:
    """What became of the rows that Megatron puts behind a vocabulary."""
    return f"; {options[DROPPED]} rows of padding left out" if DROPPED in options else ""


def _fate(options: Mapping[str, Any]) -> str:
    """What became of tensors that were allowed to be left over."""
    return "taken from hf_dir as they are" if options["command"] == "mm_to_hf" else "left over, as allowed"


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
        *_unused_text(told.options),
        "proof   every source byte used, every target byte made once"
        + (f"; {told.compared} ranges stand in several copies, which are compared" * bool(told.compared))
        + _dropped(told.options),
        f"disk    {told.disk_bytes:,} bytes needed, {free} free" + (": too small" * small),
        f"memory  at most {told.memory_bytes >> 20} MiB with {told.workers} workers",
    ]
    return "\n".join(lines)


def _unused_text(options: Mapping[str, Any]) -> list[str]:
    names = options.get("unused")
    return [f"unused  {len(names)} tensors {_fate(options)}:", *(f"        {name}" for name in names)] if names else []
