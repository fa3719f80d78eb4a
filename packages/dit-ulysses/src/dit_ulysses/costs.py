"""What computing and sending cost on a machine: the constants of the cost model, measured or guessed."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dit_ulysses.errors import PlanError

FORMAT, VERSION = "dit-ulysses costs", 1


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Constants of the cost model; ``dit-ulysses probe`` measures those of a machine.

    All defaults are guesses for one bf16 device of a server with eight Ascend 910B, good for an order and not for a
    time. They lean on what the vendor states: 56 GB/s (both ways) to each of 7 neighbours, thus 196 GB/s one way, of
    which about half; a network port of 200 Gbit/s a device, of which about four fifths; 376 TFLOP/s of bf16, of which
    about half for matrices and two fifths for attention. Latencies, `ring_hidden` and `ring_pace` have no source; the
    latter two are set so that Ulysses wins inside a node where the two are close.

    Attributes:
        latency_inside, latency_between: seconds of a tiny exchange, among ranks of one node and of several.
        bandwidth_inside, bandwidth_between: bytes/s that one rank sends while all of them do.
        attention_flops, matmul_flops: floating point operations per second of one rank.
        ring_hidden: share of what a ring sends that attention hides, where that lasts as long; never measured.
        ring_pace: pace of attention in blocks that are merged, relative to one call; never measured.
        ranks_per_node: neighbouring ranks that share a node.
        measured: names of those that were measured; the others are guesses.

    Raises:
        PlanError: a number is none, or none that it can be.
    """

    latency_inside: float = 30e-6
    bandwidth_inside: float = 100e9
    latency_between: float = 50e-6
    bandwidth_between: float = 20e9
    attention_flops: float = 150e12
    matmul_flops: float = 190e12
    ring_hidden: float = 0.5
    ring_pace: float = 0.9
    ranks_per_node: int = 8
    measured: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in CONSTANTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise PlanError(f"{name} is {value!r}; a number above 0 is expected")
            if name.startswith("ring_") and value > 1:
                raise PlanError(f"{name} is {value!r}; it is a share, so at most 1 is expected")
        if not isinstance(self.ranks_per_node, int):
            raise PlanError(f"ranks_per_node is {self.ranks_per_node!r}; a whole number is expected")
        if not isinstance(self.measured, (tuple, list)):
            raise PlanError(f"measured is {self.measured!r}; a list of names is expected")
        object.__setattr__(self, "measured", tuple(self.measured))
        _check_names(self.measured, CONSTANTS, "measured names")

    def __str__(self) -> str:
        """A table: name, value, unit, measured or not."""
        return "\n".join(
            f"{name:<18} {getattr(self, name):>12.4g} {unit:<9} {'measured' if name in self.measured else 'a guess'}"
            for name, unit in CONSTANTS.items()
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what `save` writes."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write them as JSON, under a temporary name that becomes the right one when the file is complete.

        Raises:
            PlanError: the file exists and `overwrite` was not said, or it cannot be written.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise PlanError(f"{target} exists; name another file, or say overwrite")
        partial = target.parent / f".{target.name}.{os.getpid()}.partial"
        try:
            partial.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
            partial.replace(target)
        except OSError as error:
            raise PlanError(f"{target} cannot be written: {error}") from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        """Read them. What the file leaves out stays a guess.

        Raises:
            PlanError: there is no such file, it holds something else, or a key that is unknown.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # no such file; not UTF-8 or not JSON
            raise PlanError(f"{path} cannot be read as costs: {error}") from error
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise PlanError(f"{path} holds no costs of dit-ulysses; `dit-ulysses probe --output {path}` measures some")
        if (version := record.pop("version", None)) != VERSION:
            raise PlanError(f"{path} has version {version!r}; this dit-ulysses reads {VERSION}")
        try:
            _check_names(record, {item.name: "" for item in fields(cls)}, "keys")
            return cls(**record)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


# The units of the numbers.
CONSTANTS: Mapping[str, str] = {
    "latency_inside": "s",
    "bandwidth_inside": "bytes/s",
    "latency_between": "s",
    "bandwidth_between": "bytes/s",
    "attention_flops": "FLOP/s",
    "matmul_flops": "FLOP/s",
    "ring_hidden": "",
    "ring_pace": "",
    "ranks_per_node": "ranks",
}


def _check_names(given: Mapping[str, Any] | tuple[str, ...], known: Mapping[str, str], what: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise PlanError(f"{name!r} is none of the {what}; {hint}")
