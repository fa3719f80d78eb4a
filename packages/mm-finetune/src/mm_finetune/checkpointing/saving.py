"""The checkpoints of a run: when one is due, written beside training, which of them stay.

``checkpoint/iter_…/`` holds the weights in the Megatron-style layout (``mp_rank_…``; of a run with adapters
``adapter/``, as PEFT reads it) and ``state/`` with everything else. It is written as ``.iter_….partial`` and renamed
when every process has written its part; ``latest_checkpointed_iteration.txt`` is moved last.

Training only waits for the copies of what is to be written. A thread of each process writes them; that all are done is
noticed at the end of a step. A checkpoint that can't be written (the disk is full) is told, taken away, and tried again
when the next is due: the last whole one stays. Only when it is the last one of the run is it an error.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mm_finetune.checkpointing.pieces import frozen_sum, set_weights
from mm_finetune.checkpointing.resume import FORMAT, STATE, SUMMARY, Resume
from mm_finetune.checkpointing.signals import StopSignals
from mm_finetune.checkpointing.state import HostMemory, SavedState, Snapshot, snapshot
from mm_finetune.engine.weights import Held, partial_folder, publish, write_synced
from mm_finetune.errors import CheckpointError, StoppedError

if TYPE_CHECKING:
    from mm_finetune.config import OutputConfig
    from mm_finetune.data.faults import BadRecords
    from mm_finetune.engine.step import Trainer
    from mm_finetune.engine.weights import Checkpoint
    from mm_finetune.watching import Guard


@dataclass(kw_only=True)
class Run:
    """What goes into a checkpoint.

    Attributes:
        trainer: model and optimizer.
        weights: writes the weights for people.
        guard: remembers losses.
        bad: remembers records that can't be read.
        steps: of the whole run.
        marks: of the run, for the next one to compare: ``config``, ``data``, ``model``.
        save_adapter: writes adapters into a folder, in the place of the weights; all processes call it.
    """

    trainer: Trainer
    weights: Checkpoint
    guard: Guard
    bad: BadRecords
    steps: int
    marks: Mapping[str, Any]
    save_adapter: Callable[[Path], None] | None = None


@dataclass
class _Writing:
    """A checkpoint on its way."""

    step: int
    folder: Path
    thread: threading.Thread | None = None
    error: str | None = None

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Checkpoints:
    """Saves and resumes. Every process must make the same calls.

    Args:
        run: what is saved.
        output: settings.
        signals: ask for an end.
        say: tells people of trouble; called on rank 0.
    """

    def __init__(
        self, run: Run, output: OutputConfig, signals: StopSignals, say: Callable[[str], None] | None = None
    ) -> None:
        self.run, self.output, self.signals = run, output, signals
        self.directory = output.dir / "checkpoint"
        self.ranks = run.trainer.ranks
        self._say = say or _say
        self._memory = HostMemory()
        self._writing: _Writing | None = None
        self._frozen = frozen_sum(run.trainer)
        self._failed: str | None = None

    def resume(self, found: Resume) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it is damaged or of another model, or has no optimizer; on every process alike.
        """
        summary, trainer = found.summary, self.run.trainer
        asked: frozenset[str] = frozenset()
        saved, error = None, None
        try:
            saved = SavedState(found.folder / STATE, int(summary["processes"]))
            optimizer = not self.output.no_load_optim
            if optimizer and not saved.has_optimizer and saved.keys:
                raise CheckpointError(
                    f"{found.folder} was saved without its optimizer (no_save_optim): resume with"
                    " output.no_load_optim=true, and the optimizer starts anew"
                )
            if summary["frozen"] != self._frozen:
                raise CheckpointError(
                    f"the weights that aren't trained are others than those that {found.folder} was trained with; is"
                    " model.load the same model?"
                )
            asked = saved.load(trainer, optimizer=optimizer)
        except CheckpointError as fault:
            error = fault
        told = self._gathered((error, asked))
        if first := next((fault for fault, _ in told if fault), None):
            raise first
        assert saved is not None, "or there was an error"
        if odd := sorted(saved.keys - frozenset().union(*(keys for _, keys in told))):
            raise CheckpointError(f"{found.folder} is of another model: it also holds {', '.join(odd[:3])}")
        set_weights(trainer)
        self._set_the_rest(saved, summary)

    def _set_the_rest(self, saved: SavedState, summary: Mapping[str, Any]) -> None:
        guard = summary["guard"]
        self.run.guard.losses.extend(guard["losses"])
        self.run.guard.skipped_in_a_row = guard["skipped_in_a_row"]
        self.run.bad.records.update(summary["bad"])
        if not self.output.no_load_rng and summary["layout"] == self._layout():
            saved.set_random(self.ranks.rank)

    def after(self, step: int, score: float | None = None) -> None:
        """At the end of a step: save when it is time.

        Args:
            step: its number.
            score: of an evaluation just now, higher is better; the same on every process.

        Raises:
            StoppedError: a signal asked for an end; everything is saved.
            CheckpointError: the last checkpoint of the run could not be written.
        """
        stop, busy = self._agreed(self.signals.received, self._writing is not None and self._writing.busy)
        if self._writing is not None and not busy:
            self._settle()
        every, last = self.output.save_every, step == self.run.steps
        if last or stop or (every and step % every == 0):
            self._save(step, score)
            if last or stop or not self.output.async_save:
                self._settle()
        if (last or stop) and self._failed:
            raise CheckpointError(
                f"the last checkpoint could not be written: {self._failed}; make room and go on from the one before it"
                " with output.resume=true"
            )
        if stop:
            words = f"{signal.Signals(stop).name}: saved step {step} and stopped; output.resume=true goes on from there"
            if self.ranks.rank == 0:
                self._say(words)
            self._gathered(None)  # The first process that ends makes torchrun end the others.
            raise StoppedError(words)

    def finish(self) -> None:
        """Wait for a checkpoint on its way and give it its name; all processes must call."""
        self._settle()

    def _save(self, step: int, score: float | None) -> None:
        """Copy everything and start writing."""
        self._settle()
        writing = _Writing(step, partial_folder(self.directory, step))
        run, no_save = self.run, self.output
        try:
            (writing.folder / STATE).mkdir(parents=True, exist_ok=True)
            if run.save_adapter:
                run.save_adapter(writing.folder / "adapter")
        except OSError as error:
            writing.error = str(error)
        taken = snapshot(run.trainer, self._memory, optimizer=not no_save.no_save_optim, random=not no_save.no_save_rng)
        held = {} if run.save_adapter else run.weights.held(run.trainer.model, self.ranks, self._memory.copy)
        summary = self._summary(step, score) if self.ranks.rank == 0 else None
        self._memory.wait()
        writing.thread = threading.Thread(
            target=self._write, args=(writing, taken, held, summary), name="mm-finetune-save", daemon=True
        )
        writing.thread.start()
        self._writing = writing

    def _write(self, writing: _Writing, taken: Snapshot, held: Held, summary: dict[str, Any] | None) -> None:
        """In a thread."""
        if writing.error:
            return
        try:
            taken.write(writing.folder / STATE, self.ranks.rank)
            self.run.weights.write(held, self.ranks, writing.folder, writing.step)
            if summary:
                write_synced(writing.folder / STATE / SUMMARY, json.dumps(summary))
        except Exception as error:  # noqa: BLE001  # told by the training thread, on every process
            writing.error = f"{type(error).__name__}: {error}"

    def _settle(self) -> None:
        """Wait for the checkpoint on its way; when all processes wrote their part it gets its name, else it goes."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        if writing.thread:
            writing.thread.join()
        faults = [fault for fault in self._gathered(writing.error) if fault]
        if not faults and self.ranks.rank == 0:
            try:
                publish(self.directory, writing.step)
                self._clear(writing.step)
            except OSError as error:
                faults.append(str(error))
        self._failed = next((fault for found in self._gathered(faults) for fault in found), None)
        if self._failed and self.ranks.rank == 0:
            shutil.rmtree(writing.folder, ignore_errors=True)
            self._say(
                f"warning: the checkpoint of step {writing.step} could not be written, training goes on: {self._failed}"
            )

    def _clear(self, step: int) -> None:
        """Take away what neither `keep_last` nor `keep_best` holds; not what is left of later steps."""
        last, best = self.output.keep_last, self.output.keep_best
        newest = self.directory / f"iter_{step:07d}"
        folders = sorted(folder for folder in self.directory.glob("iter_*") if folder.name <= newest.name)
        if not last and not best:
            return
        kept = set(folders[-(last or 1) :])
        scores = {folder: score for folder in folders if (score := _score(folder)) is not None}
        kept |= set(sorted(scores, key=lambda folder: (scores[folder], folder), reverse=True)[:best])
        for folder in folders:
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _summary(self, step: int, score: float | None) -> dict[str, Any]:
        """What is the same for all processes."""
        guard = self.run.guard
        return {
            "format": FORMAT,
            "step": step,
            "processes": self.ranks.world_size,
            "layout": self._layout(),
            "score": self._scored(score),
            "frozen": self._frozen,
            "guard": {"losses": list(guard.losses), "skipped_in_a_row": guard.skipped_in_a_row},
            "bad": sorted(self.run.bad.records),
            **self.run.marks,
        }

    def _scored(self, score: float | None) -> float | None:
        """An evaluation's, or without evaluations the mean loss of the last steps, negative."""
        if score is not None or self.evaluates or not self.run.guard.losses:
            return score
        return -mean(self.run.guard.losses)

    @property
    def evaluates(self) -> bool:
        """Whether the run is evaluated on its way; a checkpoint without a score is then no candidate for the best."""
        return self.run.trainer.config.eval_every > 0

    def _layout(self) -> dict[str, int]:
        """What must be equal for the random state of a process to be its own."""
        ranks = self.ranks
        return {"world": ranks.world_size, "pp": ranks.pp_size, "vpp": ranks.vpp_size, "dp": ranks.dp_size}

    def _agreed(self, stop: int, busy: bool) -> tuple[int, bool]:
        """Whether any process was asked to stop, and whether any is still writing."""
        if self.ranks.world_size == 1:
            return stop, busy
        device = next(self.run.trainer.model.parameters()).device
        told = torch.tensor([stop, int(busy)], dtype=torch.int32, device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        asked, writing = told.tolist()
        return int(asked), bool(writing)

    def _gathered(self, mine: Any) -> list[Any]:
        """What every process says."""
        told: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(told, mine)
        return told


def _score(folder: Path) -> float | None:
    try:
        score = json.loads((folder / STATE / SUMMARY).read_text(encoding="utf-8"))["score"]
    except (OSError, ValueError, KeyError):
        return None
    return None if score is None else float(score)


def _say(text: str) -> None:
    sys.stderr.write(f"mm-finetune: {text}\n")
    sys.stderr.flush()
