"""Carry a plan out: byte ranges of the sources go to their places in the new files, several at once.

Memory does not grow with the model: a worker holds a buffer or two (see :mod:`mm_convert.memory`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mm_convert.copying import Copier, Job, Output, jobs, write_all
from mm_convert.errors import OutputSpaceError
from mm_convert.job_queue import JobQueue
from mm_convert.journal import MANIFEST, Journal, is_finished, manifest, with_digests
from mm_convert.memory import buffers
from mm_convert.output import clear_leftovers, new_folder
from mm_convert.plans import Plan, Ref
from mm_convert.progress import progress
from mm_convert.stored import StoredFile


class FileLayout(Protocol):
    """A file to write, every byte's place known beforehand."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""

    @property
    def offsets(self) -> Mapping[Ref, int]:
        """Where each tensor's first byte goes."""

    def frame(self, crcs: Mapping[Ref, int]) -> Iterator[tuple[int, bytes]]:
        """What is no tensor: (offset, bytes)."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A folder to write.

    Attributes:
        directory: its final name.
        layouts: its files of tensors, by their names in the plan.
        inside: the subfolder that holds them; empty for none.
        others: further files, written after the tensors in this order: their bytes, or a file to copy.
        options: what the user chose, for the manifest.
    """

    directory: Path
    layouts: Mapping[str, FileLayout]
    inside: str = ""
    others: Mapping[str, bytes | Path]
    options: Mapping[str, Any]

    def name(self, file: str) -> str:
        """A file's name in the folder."""
        return f"{self.inside}/{file}" if self.inside else file


def execute(
    plan: Plan,
    sources: Mapping[str, StoredFile],
    target: Target,
    *,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | None = None,
    ram_cap: int | None = None,
    fsync: bool = False,
) -> None:
    """Make the target folder.

    Args:
        plan: what goes where.
        sources: the files that it reads, by their names in the plan.
        target: the folder.
        overwrite: replace a checkpoint that stands there.
        resume: go on where an earlier run of the same conversion was broken off, and keep this run's work if it is.
        workers: threads that copy; by default as many as there are processors, at most 4.
        ram_cap: bytes that the buffers of all workers may take together; fewer work if need be.
        fsync: force everything to the disk before the folder appears, so that a power cut can't take it back.

    Raises:
        RamCapError: one worker needs more than `ram_cap`.
        CheckpointError: a source changed, or copies that must agree do not.
        OutputExistsError: the target is occupied, or another process or another conversion is at it.
        OutputAccessError: the target may not be written.
        OutputSpaceError: the disk has too little space.
        OSError: reading or writing failed.
    """
    names = {file: target.name(file) for file in target.layouts}
    sizes = {names[file]: layout.size for file, layout in target.layouts.items()}
    expected = manifest(plan, sources.values(), target.options, sizes)
    if resume and is_finished(target.directory, expected, sources.values()):
        clear_leftovers(target.directory)
        return
    todo = jobs(plan, sources)
    held = buffers(plan, todo, workers=workers, ram_cap=ram_cap)
    for source in sources.values():
        source.check_unchanged()
    with (
        _space_explained(target.directory),
        new_folder(target.directory, overwrite=overwrite, resume=resume, fsync=fsync) as scratch,
    ):
        journal = Journal(scratch / "journal", expected, sources.values())
        paths = {file: scratch / "new" / name for file, name in names.items()}
        _check_space(scratch, sum(layout.size - _taken(paths[file]) for file, layout in target.layouts.items()))
        for file, layout in target.layouts.items():
            _reserve(paths[file], layout.size)
        outputs = {file: Output(path=paths[file], offsets=layout.offsets) for file, layout in target.layouts.items()}
        with progress(plan.nbytes) as advance:
            copier = Copier(plan=plan, sources=sources, outputs=outputs, advance=advance)
            _copy_all(copier, todo, journal, held.workers)
        for source in sources.values():
            source.check_unchanged()
        for file, layout in target.layouts.items():
            _write_frame(paths[file], layout, journal.done)
        _write_others(scratch / "new", {MANIFEST: with_digests(expected, journal.done, names), **target.others})


def _copy_all(copier: Copier, todo: list[Job], journal: Journal, workers: int) -> None:
    """Copy what the journal does not hold, check what it does; then it holds every tensor's CRC."""
    kept = dict(journal.done)

    def work(job: Job) -> None:
        if all(ref in kept and copier.crc(ref) == kept[ref] for ref in job):
            copier.advance(sum(copier.plan.targets[ref].nbytes for ref in job))
        else:
            journal.add(copier.run(job))

    _in_parallel(work, todo, workers, copier)


def _in_parallel(work: Callable[[Job], None], todo: list[Job], workers: int, copier: Copier) -> None:
    """Do all jobs; the first failure, or an interruption, stops the others within a buffer's time."""
    queue = JobQueue(todo)

    def work_off() -> None:
        for job in queue:
            if copier.stop.is_set():
                return
            work(job)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(work_off) for _ in range(workers)]):
                future.result()
        except BaseException:
            copier.stop.set()
            raise


def _check_space(folder: Path, needed: int) -> None:
    usage = shutil.disk_usage(folder)
    # Some network file systems don't know, and say that they have nothing at all.
    if usage.total and needed > usage.free:
        raise OutputSpaceError(
            f"{folder.parent} has {usage.free:,} bytes free, the result takes {needed:,}; make room, or choose another"
            " disk"
        )


@contextmanager
def _space_explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputSpaceError(f"{target} can't be written: {error.strerror}; make room and run again") from error
        raise


def _taken(path: Path) -> int:
    """Bytes of the disk that a file has already, if it is there; holes take none."""
    return min(path.stat().st_size, path.stat().st_blocks * 512) if path.exists() else 0


def _reserve(path: Path, size: int) -> None:
    """Give a new file its length; it takes space as it fills."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if file.tell() != size:
            file.truncate(0)
            file.truncate(size)


def _write_frame(path: Path, layout: FileLayout, crcs: Mapping[Ref, int]) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for offset, data in layout.frame(crcs):
            write_all(descriptor, data, offset)
    finally:
        os.close(descriptor)


def _write_others(folder: Path, others: Mapping[str, bytes | Path]) -> None:
    for name, content in others.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)
