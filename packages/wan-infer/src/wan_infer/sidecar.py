"""The record beside a video: what it was made from, with what, and how long it took."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .errors import RequestError
from .output import PartialFile, write_errors


def write_sidecar(path: Path | str, record: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """Write `record` as JSON beside the video `path`, as ``<video>.json``, and return where: ``out.mp4.json``.

    The record is the caller's: seed, prompt, settings, timings in seconds, peak memory in bytes; :func:`versions` gives
    its part about the machine.

    Raises:
        RequestError: the record holds something that JSON has no form for, NaN included.
        OutputError: the file exists already, or could not be written.
    """
    target = Path(f"{path}.json")
    try:
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RequestError(f"the record for {target} cannot be written as JSON: {error}") from error
    file = PartialFile(target, overwrite=overwrite)
    try:
        with write_errors(target):
            file.path.write_text(text, encoding="utf-8", newline="\n")
        file.complete()
    finally:
        file.discard()
    return target


def versions(device: torch.device | str) -> dict[str, str]:
    """Return what made the video: the versions of wan-infer, torch and Python, and the name of the device."""
    device = torch.device(device)
    try:
        own = metadata.version("wan-infer")
    except metadata.PackageNotFoundError:
        own = "not installed"  # run from its sources
    return {
        "wan-infer": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _device_name(device),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.processor() or platform.machine()
    return str(torch.get_device_module(device).get_device_name(device))
