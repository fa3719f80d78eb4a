"""``mm-convert inspect | verify | diff | auto``: commands that only read."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_convert.balance import Proposal
    from mm_convert.inspection import Inspection
    from mm_convert.same_model import Comparison


KINDS = {
    "huggingface": "Hugging Face folder",
    "megatron": "Megatron folder",
    "dcp": "distributed checkpoint of an FSDP2 trainer (DCP)",
    "torch_dist": "distributed checkpoint of megatron-core (torch_dist)",
}


def run(command: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Parse and run a command.

    Returns:
        The exit code, 1 where two checkpoints differ, and what was found.
    """
    build, do = COMMANDS[command]
    parser = ArgumentParser(prog=f"mm-convert {command}", description=HELP[command])
    build(parser)
    parser.add_argument("--json", action="store_true", help="for machines")
    return do(parser.parse_args(arguments))


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("path", help="Hugging Face or Megatron folder, or a distributed checkpoint")


def _inspect(options: Namespace) -> tuple[int, str]:
    from mm_convert.inspection import inspect

    found = inspect(options.path)
    return 0, json.dumps(asdict(found), indent=1) if options.json else _inspection_text(found)


def _inspection_text(found: Inspection) -> str:
    def known(value: object) -> str:
        return "unknown" if value is None or value == () else str(value)

    dtypes = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in found.dtypes.items())
    tied = {True: "yes", False: "no", None: "unknown"}[found.tied]
    rows = {
        "kind": KINDS[found.kind] + (f", {found.iteration}" if found.iteration else ""),
        "model": known(found.model_type),
        "converter": " or ".join(found.converters) or "unknown",
        "dtype": dtypes,
        "tied": f"{tied} ({found.tied_reason})",
        "size": f"{found.tensors} tensors in {found.files} files, {found.nbytes:,} bytes",
    }
    if found.layout is not None:
        layout = found.layout
        ep = f", ep {layout.ep_size}" if layout.ep_size > 1 else ""
        rows["parallel"] = f"tp {layout.tp_size}, pp {layout.pp_size}, vpp {layout.vpp_size}{ep}"
        from mm_convert.families import CONVERTERS

        rows["layers"] = layout.text(generative=any(CONVERTERS[name].generative for name in found.converters))
    made = found.manifest
    rows["made by"] = f"mm-convert {made['mm_convert']}, {made['options']}" if made else "unknown (no manifest)"
    return "\n".join([f"{found.path}", *(f"  {name:<10}{value}" for name, value in rows.items())])


def _compare_options(parser: ArgumentParser) -> None:
    parser.add_argument("a", help="Hugging Face or Megatron folder, any layout")
    parser.add_argument("b", help="another")
    parser.add_argument("--full", action="store_true", help="read all bytes even where manifests would do")


def _verify(options: Namespace) -> tuple[int, str]:
    found = _compared(options)
    count = len(found.differences)
    hint = f"{count} tensors differ; the first (mm-convert diff lists all):\n{_lines(found, 1)}"
    return _said(options, found, hint)


def _diff(options: Namespace) -> tuple[int, str]:
    found = _compared(options)
    kinds = [difference.kind for difference in found.differences]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return _said(options, found, f"{_lines(found, len(kinds))}\n{counts}")


def _said(options: Namespace, found: Comparison, different: str) -> tuple[int, str]:
    if options.json:
        return int(not found.same), json.dumps({"same": found.same, **asdict(found)}, indent=1)
    return int(not found.same), _same_text(options, found) if found.same else different


def _compared(options: Namespace) -> Comparison:
    from mm_convert.same_model import verify

    return verify(options.a, options.b, full=options.full)


def _same_text(options: Namespace, found: Comparison) -> str:
    how = {
        "bytes": "all bytes compared",
        "manifests": "by their manifests, nothing was touched since; --full reads all",
    }
    amounts = f"{found.tensors} tensors, {found.nbytes:,} bytes"
    return f"{options.a} and {options.b} hold the same model: {amounts} ({how[found.how]})"


def _lines(found: Comparison, shown: int) -> str:
    lines = []
    for d in found.differences[:shown]:
        counted = f"{d.elements:,} of {d.of:,} elements" if d.elements is not None else ""
        lines.append(f"{d.kind:<8}{d.name}  {' '.join(filter(None, (counted, d.detail)))}".rstrip())
    return "\n".join(lines)


def _auto_options(parser: ArgumentParser) -> None:
    parser.add_argument("hf", help="Hugging Face folder")
    parser.add_argument("--pp", type=_positive, required=True, help="pipeline ranks")
    parser.add_argument("--vpp", type=_positive, default=1, help="virtual stages of each rank (default 1)")
    parser.add_argument("--tp", type=_positive, default=1, help="tensor-parallel size (default 1)")
    parser.add_argument("--tokens", type=_positive, default=4096, help="text tokens of a micro batch (default 4096)")
    parser.add_argument(
        "--image-share", type=_share, default=0.5, help="part of these that stand for images (default 0.5)"
    )


def _auto(options: Namespace) -> tuple[int, str]:
    from mm_convert.balance import propose

    found = propose(
        options.hf,
        pp_size=options.pp,
        vpp_size=options.vpp,
        tp_size=options.tp,
        tokens=options.tokens,
        image_share=options.image_share,
    )
    return 0, json.dumps(asdict(found), indent=1) if options.json else _proposal_text(found)


def _proposal_text(found: Proposal) -> str:
    rows = [
        f"{rank:>4}  {load.llm_layers:>6}  {load.vit_layers:>6}  {load.parameters / 1e9:>9.3f}  {load.work:>5.1%}"
        f"  {load.memory_bytes / 2**30:>10.1f}"
        for rank, load in enumerate(found.ranks)
    ]
    return "\n".join(["rank     llm     vit  10^9 par.   work  GiB a card", *rows, *found.reasons, found.line])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


HELP = {
    "inspect": "say what a folder is: model, layout, dtype, parallel sizes; only headers are read",
    "verify": "whether two folders hold the same model, in any two layouts (exit code 0 or 1)",
    "diff": "which tensors of two folders differ, and by how many elements (exit code 0 or 1)",
    "auto": "propose the layer lists for a number of pipeline ranks, and say why",
}
COMMANDS: dict[str, tuple[Callable[[ArgumentParser], None], Callable[[Namespace], tuple[int, str]]]] = {
    "inspect": (_inspect_options, _inspect),
    "verify": (_compare_options, _verify),
    "diff": (_compare_options, _diff),
    "auto": (_auto_options, _auto),
}
