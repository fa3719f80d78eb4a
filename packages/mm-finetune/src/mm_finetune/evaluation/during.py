"""Evaluation within a training run: the model as it stands answers some held-out records every so many steps.

Weights, optimizer and random numbers stay as they are. What it finds stands in ``RUN/evals/step_0000100.json``, which
``mm-finetune report`` reads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mm_finetune.config import TrainConfig
from mm_finetune.data import Dataset, EncodedSample, Fault, Processes, collate
from mm_finetune.engine.generation import Generator, resting
from mm_finetune.errors import DataError
from mm_finetune.evaluation.answerer import END
from mm_finetune.evaluation.answers import Answer, Evaluation, Failure
from mm_finetune.evaluation.questions import Question
from mm_finetune.evaluation.records import question_of
from mm_finetune.evaluation.run import judged
from mm_finetune.report import eval_path
from mm_finetune.template import IGNORE, IMAGE, VIDEO, encode_prompt

if TYPE_CHECKING:
    from mm_finetune.engine.step import Trainer
    from mm_finetune.watching import RunLog


@dataclass(frozen=True)
class Held:
    """A held-out record: the question, and how it is encoded with and without its answer."""

    question: Question
    whole: EncodedSample
    prompt: EncodedSample


class Evaluator:
    """Evaluates every ``train.eval_every`` steps, and after the last one.

    The records stay in memory with their pixels, dealt over the data-parallel ranks.

    Args:
        dataset: of :func:`held_out`; None: there is no evaluation.
        config: the run.
        trainer: whose model is asked.
        device: of the model.
        log: told of results.

    Raises:
        DataError: no record can be asked; on every process alike.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        config: TrainConfig,
        trainer: Trainer,
        device: torch.device,
        log: RunLog,
    ) -> None:
        self.dataset, self.config, self.log, self.device = dataset, config, log, device
        self.ranks = trainer.ranks
        if dataset is None:
            return
        self.mine, self.failures = self._read(dataset)
        self.generator = Generator(
            trainer,
            device,
            end=dataset.encoder.tokenizer.convert_tokens_to_ids(END),
            max_new_tokens=config.train.eval_max_new_tokens,
            rows=config.train.micro_batch_size,
            room=config.room,
        )

    def after(self, step: int, trainer: Trainer) -> float | None:
        """Evaluate if it is time; every process must call.

        Returns:
            The mean score, the same on every process; None: it is not time.
        """
        every = self.config.train.eval_every
        if self.dataset is None or not every or (step % every and step != self.config.train.steps):
            return None
        with self.log.aside():
            began = time.monotonic()
            evaluation = self._evaluate(step, trainer)
            fault = self._saved(evaluation, step)
            said = (
                f"{evaluation.metric} {evaluation.accuracy:.1%}  loss {evaluation.loss:.4f}"
                f"  {len(evaluation.answers):,} records in {time.monotonic() - began:.1f} s{fault}"
            )
            self.log.evaluated(step, {"score": evaluation.accuracy, "loss": evaluation.loss or 0.0}, said)
        return evaluation.accuracy

    def _evaluate(self, step: int, trainer: Trainer) -> Evaluation:
        dataset, config = self.dataset, self.config
        assert dataset is not None, "only called with a data set"
        with torch.random.fork_rng(devices=[]):
            said = self.generator.answer([held.prompt for held in self.mine.values()])
            total, tokens = self._loss(trainer)
        texts = {
            number: str(dataset.encoder.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            for number, ids in zip(self.mine, said, strict=True)
        }
        answers = {n: judged(self.mine[n].question, text, config.train.eval_metric) for n, text in texts.items()}
        found, total, tokens = self._joined(answers, total, tokens)
        return Evaluation(
            model=f"{config.output.dir.name} after step {step}",
            dataset_dir=dataset.encoder.root,
            answers=[found[number] for number in sorted(found)],
            metric=config.train.eval_metric,
            failures=self.failures,
            loss=total / max(1, tokens),
        )

    def _saved(self, evaluation: Evaluation, step: int) -> str:
        """Write the file; returns what is to be said of it. A full disk does not end the run."""
        path = eval_path(self.config.output.dir, step)
        if self.ranks.rank == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                evaluation.save(path, overwrite=True)
            except OSError as error:
                return f"  NOT WRITTEN: {path}: {error.strerror}"
        return ""

    def _loss(self, trainer: Trainer) -> tuple[float, int]:
        """Sum over this rank's tokens that carry loss, and their number."""
        if not self.mine:
            return 0.0, 0
        parts = self.generator.parts(sorted((h.whole for h in self.mine.values()), key=lambda one: len(one.input_ids)))
        batches = [collate(part, packed=self.generator.room is not None).to(self.device) for part in parts]
        with resting(trainer.model):
            sums = trainer.log_probabilities(batches)
        return -float(sum(part.sum() for part in sums)), sum(int((b.loss_mask != 0).sum()) for b in batches)

    def _joined(self, answers: Mapping[int, Answer], total: float, tokens: int) -> tuple[dict[int, Answer], float, int]:
        """Of all data-parallel ranks; the loss is known to last pipeline stages alone."""
        speaks = self.ranks.last_stage and self.ranks.tp_rank == 0
        told: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(told, (dict(answers), total, tokens) if speaks else None)
        parts: list[tuple[dict[int, Answer], float, int]] = [part for part in told if part is not None]
        joined = {number: answer for part, _, _ in parts for number, answer in part.items()}
        return joined, sum(part[1] for part in parts), sum(part[2] for part in parts)

    def _read(self, dataset: Dataset) -> tuple[dict[int, Held], tuple[Failure, ...]]:
        """This rank's records by number, and those of all ranks that can't be asked; the same on every process."""
        ranks = self.ranks
        exchange = Processes(self.device, needs_pixels=ranks.first_stage)
        dataset.adopt(exchange.once(lambda: dataset.index))
        numbers = _spread(dataset.index.usable.tolist(), self.config.data.eval_samples)
        held: dict[int, Held] = {}
        faults: list[Fault] = []
        for number in numbers[ranks.dp_rank :: ranks.dp_size]:
            try:
                held[number] = self._held(dataset, number)
            except (DataError, OSError) as error:
                faults.append(Fault(number, "unreadable", str(error)))
        bad = {fault.record: fault for fault in exchange.union(faults)}
        if len(bad) == len(numbers):
            raise DataError(f"no record of {dataset.config.path} can be asked: {next(iter(bad.values())).message}")
        failures = tuple(Failure(number=fault.record + 1, reason=fault.message) for fault in bad.values())
        return {number: one for number, one in held.items() if number not in bad}, failures

    def _held(self, dataset: Dataset, number: int) -> Held:
        sample, encoder = dataset.samples[number], dataset.encoder
        if any(mark in sample.messages[-1].content for mark in (IMAGE, VIDEO)):
            raise DataError("its answer shows a picture")
        choice = self.config.train.eval_metric == "choice"
        question = question_of(sample, number + 1, encoder.root, choice=choice)
        whole = encoder.encode(sample, dataset.index.media(number), number, pixels=self.ranks.first_stage)
        ids = encode_prompt(
            sample.messages[:-1],
            tokenizer=encoder.tokenizer,
            image_token_counts=whole.images.token_counts if whole.images else (),
            video_token_counts=_counts(whole, encoder.images.merge_size),
        )
        count = len(ids)
        if ids != whole.input_ids[:count].tolist():
            raise DataError("it is too long")
        return Held(question, whole, _cut(whole, count))


def held_out(config: TrainConfig, *, progress: bool = False) -> Dataset | None:
    """The records that are evaluated, looked at; None where none are asked for.

    Args:
        config: the run.
        progress: show a bar, on a terminal.

    Raises:
        DataError: the file can't be read, or no record of it can be used.
    """
    data = config.data
    if not config.train.eval_every or data.eval_path is None:
        return None
    settings = replace(
        data, path=data.eval_path, max_samples=None, truncate="error", on_bad="skip", max_bad_ratio=1.0, cache_mib=0
    )
    dataset = Dataset(settings, config.model.hf_dir)
    dataset.check(progress=progress)
    return dataset


def _cut(sample: EncodedSample, count: int) -> EncodedSample:
    """The first tokens, without loss."""
    ids = sample.input_ids[:count]
    return replace(
        sample,
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        positions=sample.positions[:, :count],
        weights=None,
    )


def _counts(sample: EncodedSample, merge_size: int) -> list[int]:
    if sample.videos is None:
        return []
    return [t * h * w // merge_size**2 for t, h, w in sample.videos.video_grid_thw.tolist()]


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers, evenly; all of them where there are no more, or `count` is 0."""
    if not 0 < count < len(numbers):
        return list(numbers)
    return [numbers[place * len(numbers) // count] for place in range(count)]
