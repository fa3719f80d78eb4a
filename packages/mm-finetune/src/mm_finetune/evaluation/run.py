"""An evaluation: every record asked, on one process or dealt over many, the answers judged and written down.

What is asked together depends on the data and the batch size alone: neither on the number of processes nor on what an
interrupted run has answered already. So are the answers, to the last bit.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from mm_finetune.config import DataConfig
from mm_finetune.errors import ConfigError, DataError
from mm_finetune.evaluation.answerer import Answerer
from mm_finetune.evaluation.answers import Answer, Evaluation, Failure
from mm_finetune.evaluation.journal import Journal, Row
from mm_finetune.evaluation.metrics import Metric, is_right, score
from mm_finetune.evaluation.processes import Team, team
from mm_finetune.evaluation.prompts import Outline, Prompt, PromptReader, limits_of
from mm_finetune.evaluation.questions import Question, Questions, open_questions
from mm_finetune.launch import process_rank
from mm_finetune.output import require_free_file

THREADS = min(8, os.cpu_count() or 1)  # that read pictures
WINDOW = 16  # batches that are looked at together, to put questions of like length side by side


class Answers(Protocol):
    """What an evaluation needs of a model."""

    prompts: PromptReader

    def answer(self, prompts: Sequence[Any]) -> list[str]:
        """The answers to prompts, in their order."""


def evaluate(
    hf_dir: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    dataset_dir: str | Path | None = None,
    metric: Literal["auto"] | Metric = "auto",
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    limits: DataConfig | None = None,
    adapter: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Evaluation:
    """Ask a model every question of a data set, and write down what it says. Under torchrun every process must call.

    Args:
        hf_dir: the model: an ordinary Hugging Face folder of Qwen2.5-VL or Qwen2-VL.
        data: records that end with the right answer, or a TSV file of VLMEvalKit; see :mod:`.questions`.
        output: the JSON file to write; meanwhile the answers stand in ``OUTPUT.answers.jsonl``.
        dataset_dir: the folder that pictures are relative to; default: the folder of `data`.
        metric: how answers are judged, see :mod:`.metrics`; ``auto``: by what the data set is.
        batch_size: records that are answered together. It does not change the answers but for rounding.
        max_new_tokens: longest answer; default: 8, of a table 128.
        limits: the data section of a training run, whose limits of pictures then hold; default: the model folder's.
        adapter: a PEFT folder with a LoRA adapter for the model.
        resume: go on where an interrupted evaluation stopped.
        overwrite: replace `output`, and forget an interrupted evaluation.
        progress: show a bar, on a terminal.
        tell: told what is asked, before a model is read.

    Returns:
        All answers, the same on every process.

    Raises:
        OutputExistsError: `output` is there already, or an interrupted evaluation is.
        ConfigError: a number that can't be, or `hf_dir` is no model folder.
        CheckpointError: the weights are not exactly those of the model.
        DataError: the data can't be read, or no record of it can be asked.
    """
    hf_dir, data, output = Path(hf_dir), Path(data), Path(output)
    if process_rank()[0] == 0:  # the only one that writes
        require_free_file(output, overwrite=overwrite)
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more")
    root = None if dataset_dir is None else Path(dataset_dir)
    limits = None if limits is None else limits_of(limits)
    questions = open_questions(data, dataset_dir=root, metric=metric)
    longest = max_new_tokens or questions.usual_tokens
    total = _survey(questions, data)
    if tell:
        tell(f"{total:,} questions; metric: {questions.metric} ({questions.why})")
    purpose = {
        "model": str(hf_dir), "data": str(data), "records": total, "metric": questions.metric,
        "batch_size": batch_size, "max_new_tokens": longest, "adapter": adapter and str(adapter),
        "limits": None if limits is None else repr(limits),
    }  # fmt: skip
    journal = Journal(output, purpose)

    def model(device: Any) -> Answerer:
        merged = None if adapter is None else Path(adapter)
        return Answerer(hf_dir, max_new_tokens=longest, data=limits, adapter=merged, device=device)

    with team() as here:
        done = here.from_first(journal.begin(resume=resume, overwrite=overwrite) if here.rank == 0 else {})
        if len(done) < total:
            asked = ask(questions, model(here.device), batch_size=batch_size, done=done.keys(), here=here)
            for rows in _shown(asked, total, len(done), progress and here.rank == 0):
                if here.rank == 0:
                    journal.add(rows)
        found = here.from_first(journal.rows() if here.rank == 0 else {})
        if here.rank == 0 and not any(isinstance(row, Answer) for row in found.values()):
            journal.remove()  # there is nothing to go on from
        evaluation = evaluation_of(str(hf_dir), questions, found)
        if here.rank == 0:
            evaluation.save(output, overwrite=overwrite)
            journal.remove()
        return evaluation


def ask(
    questions: Questions, model: Answers, *, batch_size: int, done: Any = (), here: Team | None = None
) -> Iterator[list[tuple[int, Row]]]:
    """Ask all questions; gives what was answered, or could not be asked, by all processes, a few batches at a time.

    Args:
        questions: what is asked.
        model: who answers.
        batch_size: questions that are answered together.
        done: numbers of records that are not needed.
        here: this process among others; default: there are no others.
    """
    reader, rank, size = model.prompts, here.rank if here else 0, here.size if here else 1
    for batches, failures in _planned(questions, reader, batch_size):
        if fresh := [(failure.number, failure) for failure in failures if failure.number not in done]:
            yield list(fresh)
        needed = [batch for batch in batches if any(one.question.number not in done for one in batch)]
        rounds = -(-len(needed) // size)
        # A process without a batch in the last round has an empty one.
        mine = (needed + [[]] * size)[rank::size][:rounds]
        for batch, read in _read_ahead(reader, mine):
            rows = _answered(batch, read, model, questions.metric)
            joined = here.joined(rows) if here else [rows]
            yield [(number, row) for part in joined for number, row in part if number not in done]


def evaluation_of(model: str, questions: Questions, rows: dict[int, Row]) -> Evaluation:
    """The result of answers by record number.

    Raises:
        DataError: there is no answer at all.
    """
    answers = [row for row in rows.values() if isinstance(row, Answer)]
    failures = [row for row in rows.values() if isinstance(row, Failure)]
    if not answers:
        raise DataError(f"no record can be asked; the first one: {failures[0].reason}" if failures else "no records")
    return Evaluation(
        model=model, dataset_dir=questions.root, answers=answers, metric=questions.metric, failures=failures
    )


def judged(question: Question, prediction: str, metric: Metric) -> Answer:
    """An answer with its score."""
    value = score(metric, prediction, question.answers, question.options)
    return Answer(
        image=question.image,
        question=question.shown,
        answer=question.answers[0],
        prediction=prediction,
        correct=is_right(metric, value),
        score=value,
        groups=question.groups,
    )


def _survey(questions: Questions, data: Path) -> int:
    """The number of records; looked at before a model is loaded.

    Raises:
        DataError: none of them can be asked.
    """
    total, failures = 0, 0
    first: Failure | None = None
    for found in questions:
        total += 1
        if isinstance(found, Failure):
            failures, first = failures + 1, first or found
    if first is not None and failures == total:
        raise DataError(f"no record of {data} can be asked; record {first.number}: {first.reason}")
    if not total:
        raise DataError(f"{data} holds no records")
    return total


def _planned(
    questions: Questions, reader: PromptReader, batch_size: int
) -> Iterator[tuple[list[list[Outline]], list[Failure]]]:
    """Batches of questions of like length, a window at a time; every process plans the same ones."""
    records = iter(questions)
    while window := list(islice(records, WINDOW * batch_size)):
        outlines, failures = [], []
        for found in window:
            try:
                if isinstance(found, Failure):
                    failures.append(found)
                else:
                    outlines.append(reader.outline(found))
            except (DataError, OSError) as error:
                failures.append(Failure(number=found.number, reason=str(error)))
        outlines.sort(key=lambda one: len(one.input_ids))
        yield [outlines[at : at + batch_size] for at in range(0, len(outlines), batch_size)], failures


def _read_ahead(
    reader: PromptReader, batches: Sequence[list[Outline]]
) -> Iterator[tuple[list[Outline], list[Prompt | Failure]]]:
    """Batches with what was read for them in threads, while the one before was answered."""

    def read(outline: Outline) -> Prompt | Failure:
        try:
            return reader.read(outline)
        except (DataError, OSError) as error:
            return Failure(number=outline.question.number, reason=str(error))

    coming: deque[tuple[list[Outline], list[Future[Prompt | Failure]]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in batches:
            coming.append((batch, [pool.submit(read, outline) for outline in batch]))
            if len(coming) > 1:
                first, found = coming.popleft()
                yield first, [one.result() for one in found]
        for last, found in coming:
            yield last, [one.result() for one in found]


def _answered(
    batch: Sequence[Outline], read: Sequence[Prompt | Failure], model: Answers, metric: Metric
) -> list[tuple[int, Row]]:
    """The questions of a batch that could be read are answered together."""
    rows: list[tuple[int, Row]] = [(one.number, one) for one in read if isinstance(one, Failure)]
    pairs = [(o.question, one) for o, one in zip(batch, read, strict=True) if isinstance(one, Prompt)]
    texts = model.answer([prompt for _, prompt in pairs]) if pairs else []
    answers = zip((question for question, _ in pairs), texts, strict=True)
    return rows + [(question.number, judged(question, text, metric)) for question, text in answers]


def _shown(
    found: Iterator[list[tuple[int, Row]]], total: int, done: int, progress: bool
) -> Iterator[list[tuple[int, Row]]]:
    from tqdm import tqdm

    # disable=None: silent where there is no terminal.
    bar = tqdm(total=total, initial=done, unit="records", delay=2, disable=None if progress else True)
    with closing(bar):
        for rows in found:
            yield rows
            bar.update(len(rows))
