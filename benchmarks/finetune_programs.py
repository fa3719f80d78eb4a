"""The programs that `finetune.py` measures, each in a process of its own; writes what its steps took.

    python benchmarks/finetune_programs.py trainer RUN.yaml OUT.json [section.key=value …]

Ours is the whole of `mm-finetune train`. Hugging Face's Trainer and TRL's SFTTrainer get the same records in the same
order, with what their own tokenizing would give them ready made: token ids and labels; pictures are opened, resized and
cut into patches by transformers' image processor, in workers of the data loader, as many as ours has threads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from mm_finetune.config import TrainConfig, load_config
from mm_finetune.data import Dataset, step_numbers

IGNORED = -100


class Records(TorchDataset[dict[str, Any]]):
    """The records of all steps, one behind the other; a picture is a path until a batch is made."""

    def __init__(self, config: TrainConfig, *, grouped: bool) -> None:
        self.dataset = Dataset(config.data, config.model.hf_dir)
        train, usable = config.train, self.dataset.index.usable
        self.numbers: list[int] = []
        for step in range(1, train.steps + 1):
            places = step_numbers(len(usable), step, global_batch_size=train.global_batch_size, seed=train.seed)
            numbers = usable[places].tolist()
            # What length grouped sampling makes of a step at best.
            self.numbers += sorted(numbers, key=lambda n: -int(self.dataset.index.tokens[n])) if grouped else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = self.numbers[place]
        sample = self.dataset.encode(number, pixels=False)
        paths = self.dataset.encoder.paths(self.dataset.samples[number].images)
        return {"input_ids": sample.input_ids, "labels": sample.labels, "paths": paths}


class Collator:
    """The usual one: pad on the right, and let the image processor see all pictures of the batch."""

    def __init__(self, config: TrainConfig, image_token: int, pad_token: int) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.processor = Qwen2VLImageProcessorPil.from_pretrained(config.model.hf_dir)
        self.image_token, self.pad_token = image_token, pad_token

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A micro-batch."""
        from PIL import Image

        tokens, targets = ([torch.as_tensor(record[name]) for record in records] for name in ("input_ids", "labels"))
        ids, labels = _padded(tokens, self.pad_token), _padded(targets, IGNORED)
        mask = _padded([torch.ones_like(each) for each in tokens], 0)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        batch["mm_token_type_ids"] = ((ids == self.image_token) & mask.bool()).int()
        if paths := [path for record in records for path in record["paths"]]:
            pictures = [Image.open(path).convert("RGB") for path in paths]
            batch |= dict(self.processor(images=pictures, return_tensors="pt"))
        return batch


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers leaves it without a type
    """Loss and end of each step: seconds on the clock, and of the processor in this process and its threads."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def ended(self) -> None:
        """A step has ended."""
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by Trainer behind the optimizer."""
        self.ended()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Called by Trainer behind `on_step_end`."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    """Train, and write each step's end, loss and tokens."""
    program, path, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    config, watch = load_config(path, sys.argv[4:]), Watch()
    if program == "ours":
        ours(config, watch)
    else:
        peer(program, config, watch, target.with_suffix(".run"))
    if int(os.environ.get("RANK", 0)) == 0:
        told = {"ends": watch.ends, "losses": watch.losses, "tokens": watch.tokens}
        target.write_text(json.dumps(told), encoding="utf-8")


def ours(config: TrainConfig, watch: Watch) -> None:
    """What the command does, with an ear at its log."""
    from mm_finetune.training import prepare, train
    from mm_finetune.watching import RunLog

    log_step = RunLog.step

    def step(self: RunLog, number: int, **told: Any) -> Any:
        watch.ended()
        watch.losses.append(told["loss"])
        watch.tokens.append(told["tokens"])
        return log_step(self, number, **told)

    with patch.object(RunLog, "step", step):
        train(prepare(config, world_size=int(os.environ.get("WORLD_SIZE", 1))))


def peer(program: str, config: TrainConfig, watch: Watch, folder: Path) -> None:
    """Trainer or SFTTrainer, with ``-grouped`` records of about the same length side by side."""
    torch.manual_seed(0)
    records, model = Records(config, grouped=program.endswith("grouped")), _model(config)
    collator = Collator(config, model.config.image_token_id, records.dataset.encoder.tokenizer.pad_token_id)
    made = TRAINERS[program.split("-")[0]](config, model, records, collator, folder)
    made.add_callback(watch)
    made.train()
    size = config.train.global_batch_size
    lengths = [int(records.dataset.index.tokens[number]) for number in records.numbers]
    watch.tokens = [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]


def _model(config: TrainConfig) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    made = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model.hf_dir, attn_implementation="sdpa")
    # Otherwise Trainer takes the mean of the means of micro-batches, which is another loss.
    type(made).accepts_loss_kwargs = True
    return made


def _settings(config: TrainConfig, folder: Path) -> dict[str, Any]:
    train = config.train
    return {
        "output_dir": str(folder), "max_steps": train.steps, "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // train.micro_batch_size, "use_cpu": True,
        "train_sampling_strategy": "sequential", "dataloader_num_workers": config.data.workers, "bf16": False,
        "learning_rate": train.lr, "lr_scheduler_type": "constant", "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1, "adam_beta2": train.adam_beta2, "adam_epsilon": train.adam_eps,
        "max_grad_norm": train.clip_grad, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "remove_unused_columns": False, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def _trainer(config: TrainConfig, model: Any, records: Records, collator: Collator, folder: Path) -> Trainer:
    arguments = TrainingArguments(**_settings(config, folder))
    return Trainer(model=model, args=arguments, train_dataset=records, data_collator=collator)


def _trl(config: TrainConfig, model: Any, records: Records, collator: Collator, folder: Path) -> Trainer:
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    rows = Table.from_list([{name: _plain(value) for name, value in record.items()} for record in records])

    arguments = SFTConfig(**_settings(config, folder), dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    made: Trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator,
        processing_class=records.dataset.encoder.tokenizer,
    )  # fmt: skip
    return made


TRAINERS: dict[str, Callable[..., Trainer]] = {"trainer": _trainer, "trl": _trl}


def _plain(value: Tensor | list[Path]) -> list[Any]:
    return value.tolist() if isinstance(value, Tensor) else [str(path) for path in value]


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


if __name__ == "__main__":
    main()
