"""Finish or leave nothing: a folder appears under its name when it is complete, not before."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mm_convert.errors import OutputAccessError, OutputExistsError
from mm_convert.megatron import TRACKER


def check_free(target: Path, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse a target that may not be written.

    Args:
        target: the folder to make; an empty one is free.
        overwrite: whether a checkpoint that stands there may be replaced.
        sources: folders that are read, and must outlive the writing.

    Raises:
        OutputExistsError: it is occupied, no checkpoint, holds a source, or can't be replaced as a whole.
    """
    real = resolved(target)
    if real.is_symlink():
        raise OutputExistsError(f"{target} is a symbolic link that leads nowhere; remove it, or choose another folder")
    if os.path.ismount(real):
        raise OutputExistsError(f"{target} is a mount point, whose name can't change hands; choose a folder inside it")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise OutputExistsError(f"{target} exists and is not empty; choose another folder or add --overwrite")
    if not _is_checkpoint(target):
        raise OutputExistsError(f"{target} is no checkpoint, so it is not replaced; choose another folder")
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise OutputExistsError(f"{target} can't be replaced: {source}, which is read, stands in it")


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is of a kind that this package writes; many a folder that has a ``config.json`` is none."""
    if (folder / TRACKER).is_file():
        return True
    configured = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return configured and any(folder.glob("*.safetensors"))


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool, resume: bool = False, fsync: bool = False) -> Iterator[Path]:
    """A folder beside `target` to work in. What is made in its ``new`` takes the target's place on success.

    Args:
        target: the folder to make; where a symbolic link points, if it is one.
        overwrite: replace a checkpoint that stands there.
        resume: give back what an earlier run left, and leave this run's work if it fails.
        fsync: have everything on the disk before it takes the target's place, and its name after that.

    Raises:
        OutputExistsError: see :func:`check_free`, or another process is at it.
        OutputAccessError: it may not be written.
    """
    target, scratch = resolved(target), scratch_of(target)
    _make_places(target, scratch)
    with _locked(target, scratch):
        _settle(target, scratch)
        finished = False
        try:
            check_free(target, overwrite=overwrite)
            if not resume:
                _empty(scratch)
            (scratch / "new").mkdir(exist_ok=True)
            yield scratch
            if fsync:
                _force_tree(scratch / "new")
            if target.exists():
                target.rename(scratch / "old")
            (scratch / "new").rename(target)
            finished = True
            if fsync:
                _force(target.parent)
        finally:
            _settle(target, scratch)
            if finished or not resume or not (scratch / "new").exists():
                shutil.rmtree(scratch, ignore_errors=True)


def scratch_of(target: Path) -> Path:
    """Where a target is made before it appears."""
    real = resolved(target)
    return real.parent / f".{real.name}.partial"


def resolved(target: Path) -> Path:
    """The folder itself, symbolic links followed; it need not exist. A link that leads to itself stays one."""
    return Path(os.path.realpath(target))


def clear_leftovers(target: Path) -> None:
    """Remove what a run left that was killed just after the target had appeared.

    Raises:
        OutputExistsError: another process is at it.
    """
    scratch = scratch_of(target)
    if scratch.exists():
        with _locked(target, scratch):
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _locked(target: Path, scratch: Path) -> Iterator[None]:
    """Hold the lock of the working folder, so that no second process works in it."""
    lock = os.open(scratch / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise OutputExistsError(
            f"another process is writing {target}; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            os.close(lock)
            raise
        # Some network file systems know no locks; there the user sees to it that one process writes.
    try:
        yield
    finally:
        os.close(lock)


def _make_places(target: Path, scratch: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputExistsError(f"{target} can't be made: {error.filename} is no folder") from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OutputAccessError(
            f"{target} can't be made: {error.strerror} ({error.filename}); choose a folder that you may write"
        ) from error


def _settle(target: Path, scratch: Path) -> None:
    """End a replacement that was broken off between its two renames: the old checkpoint comes back."""
    if (scratch / "old").exists() and not target.exists():
        (scratch / "old").rename(target)
    shutil.rmtree(scratch / "old", ignore_errors=True)


def _empty(scratch: Path) -> None:
    for path in scratch.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _force_tree(folder: Path) -> None:
    """Every file and folder below, and itself, on the disk."""
    for path in folder.rglob("*"):
        _force(path)
    _force(folder)


def _force(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems force files, but know nothing of the kind for folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
