"""What the reference model, which is the model before the first step, thinks of every answer.

It never changes, so it is worked out once, before the first step, and kept on disk: under a key of the weights, the
data and all settings that a log-probability depends on, with the mark of each pair's files. A run that goes on, or
another one with the same model and data, finds it there; pairs whose files have changed are worked out again.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from mm_convert.megatron import RANK_FILE
from mm_finetune.config import PreferenceConfig, TrainConfig
from mm_finetune.data import Batch, Dataset, Exchange, Loader
from mm_finetune.data.cache import cache_file, load_arrays, save_arrays
from mm_finetune.engine.step import Trainer
from mm_finetune.engine.weights import Checkpoint
from mm_finetune.preference.objective import PreferenceObjective, pair_numbers, paired

VERSION = 1  # of what is stored and of how it is worked out
Values = NDArray[np.float64]
Steps = Callable[[NDArray[np.int64]], Values]


def preference_objective(
    config: TrainConfig, checkpoint: Checkpoint, loader: Loader, trainer: Trainer, device: torch.device
) -> PreferenceObjective:
    """The objective of a run; every process calls it, before the weights are changed or a checkpoint's are loaded.

    Args:
        config: the run, with ``preference``.
        checkpoint: the weights that the model has.
        loader: of the pairs.
        trainer: the model.
        device: of this process.

    Raises:
        DataError: a pair can't be read, and ``data.on_bad`` does not bear it.
    """
    assert config.preference is not None, "asked for with preference alone"
    if config.preference.reference_free:
        return PreferenceObjective(config.preference, None)

    def measure(numbers: NDArray[np.int64]) -> Values:
        return _measured(loader.in_order(numbers), trainer, len(loader.dataset), device)

    values = remembered(loader.dataset, loader.exchange, lambda: _key(config, checkpoint), measure)
    return PreferenceObjective(config.preference, torch.from_numpy(values))


def objective_at_start(
    config: PreferenceConfig, batches: Sequence[Batch], trainer: Trainer, records: int
) -> PreferenceObjective:
    """The objective of a first step on these micro-batches, whose reference is the model as it is; nothing is kept.

    Args:
        config: which loss.
        batches: of this data-parallel rank.
        trainer: the model, before its first step.
        records: of the data set.
    """
    if config.reference_free:
        return PreferenceObjective(config, None)
    values = torch.full((records, 2), torch.nan, dtype=torch.float64)
    values[list(pair_numbers(batches))] = paired(trainer.log_probabilities(batches)).cpu()
    return PreferenceObjective(config, values)


def remembered(dataset: Dataset, exchange: Exchange, key: Callable[[], Sequence[object]], measure: Steps) -> Values:
    """``[records, 2]``: NaN for a record that is not used or could not be read, which is remembered too.

    Args:
        dataset: the pairs.
        exchange: how processes talk.
        key: what the values depend on, besides the data; asked on one process.
        measure: works out those of some records, on all processes together.
    """
    index = dataset.index

    def stored() -> tuple[Path, Values, NDArray[np.bool_]]:
        file = cache_file(dataset.encoder, "reference", VERSION, *key())
        found = load_arrays(file, ("values", "marks", "known"), len(dataset))
        if found is None:
            return file, np.full((len(dataset), 2), np.nan), np.zeros(len(dataset), dtype=np.bool_)
        return file, found["values"], found["known"] & (found["marks"] == index.marks)

    file, values, known = exchange.once(stored)
    missing = index.usable[~known[index.usable]]
    if len(missing):
        values[missing] = measure(missing)[missing]
        known[missing] = True
        arrays = {"values": values, "marks": index.marks, "known": known}
        exchange.once(lambda: save_arrays(file, arrays))
    return values


def _measured(loader: Loader, trainer: Trainer, records: int, device: torch.device) -> Values:
    """Every process of a pipeline takes part; all get all values."""
    from tqdm import tqdm

    values = torch.full((records, 2), -torch.inf, dtype=torch.float64, device=device)
    # disable=None: silent where there is no terminal.
    silent = None if trainer.ranks.rank == 0 else True
    with closing(loader):
        for step in tqdm(range(1, loader.settings.last_step + 1), desc="reference", delay=2, disable=silent):
            data = loader.step(step, device)
            logp_P2 = paired(trainer.log_probabilities(data.batches))
            numbers = pair_numbers(data.batches)
            good = [place for place, number in enumerate(numbers) if number not in data.bad]
            values[[numbers[place] for place in good]] = logp_P2[good]
    return _gathered(values).where(values.isfinite(), torch.nan).cpu().numpy()


def _gathered(values: Tensor) -> Tensor:
    """Each data-parallel rank of the last stage has some; the others are -inf."""
    dist.all_reduce(values, dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(values, src=source, group=parallel_state.get_pipeline_model_parallel_group())
    return values


def _key(config: TrainConfig, checkpoint: Checkpoint) -> tuple[object, ...]:
    files = [config.model.hf_dir / "config.json"]
    if config.lora and config.lora.load:
        # A new adapter adds nothing at first; one that training goes on from is part of the reference.
        files += sorted(file for file in config.lora.load.iterdir() if file.is_file())
    return weights_digest(checkpoint), [hashlib.sha256(f.read_bytes()).hexdigest() for f in files], config.train.dtype


def weights_digest(checkpoint: Checkpoint) -> str:
    """Digest of the weights of every rank: of the checksums that torch's zip files hold of each tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(checkpoint.folder.directory.rglob(RANK_FILE)):
        with zipfile.ZipFile(file) as stored:
            parts = sorted((entry.filename, entry.CRC, entry.file_size) for entry in stored.infolist())
        digest.update(repr((file.parent.name, parts)).encode())
    return digest.hexdigest()
