"""What a run remembers for the next one: arrays under a key of all that they depend on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_finetune.data.encoder import Encoder

logger = logging.getLogger(__name__)


def cache_file(encoder: Encoder, name: str, *parts: object) -> Path:
    """The file for a data set as an encoder sees it.

    Args:
        encoder: of the model and the limits.
        name: what the file holds.
        parts: what else that depends on.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = encoder.config.cache_dir or home / "mm-finetune"
    content = hashlib.sha256()
    with encoder.config.path.open("rb") as data:
        while block := data.read(1 << 20):
            content.update(block)
    key = (*parts, content.hexdigest(), encoder.fingerprint(), encoder.config.max_samples)
    return folder / f"{name}-{hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()}.npz"


@contextlib.contextmanager
def one_at_a_time(file: Path, data: Path) -> Iterator[None]:
    """Let one process of a machine do the work, and the others wait: they then find what it has remembered.

    Args:
        file: where it is remembered; where nothing can be written there, nobody waits.
        data: the data set's file, which is locked: a process that dies gives it free.
    """
    with data.open("rb") as held:
        # Some network file systems lock nothing, or only what is open for writing: each then does its own work.
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            if os.access(file.parent, os.W_OK):
                fcntl.flock(held, fcntl.LOCK_EX)
        yield


def load_arrays(file: Path, names: Sequence[str], count: int) -> dict[str, NDArray[Any]] | None:
    """What was saved, or None: nothing, or not a whole file with `count` entries in the first array."""
    try:
        # Opened here: numpy does not close what it can't read.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return arrays if len(arrays[names[0]]) == count else None


def save_arrays(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Under a name of its own first: several processes may do this at once. What can't be written ends no run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz.part", delete=False) as part:
            np.savez(part, allow_pickle=False, **dict(arrays))
        Path(part.name).replace(file)
    except OSError as error:
        logger.warning("nothing is remembered for the next run: %s can't be written: %s", file, error.strerror)
