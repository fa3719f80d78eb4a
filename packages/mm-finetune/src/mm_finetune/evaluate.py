"""Let a Hugging Face model answer the records of a data set, and count what is exactly right.

Generation is transformers' own: the model is read as anybody else would read it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_datafmt import DataFormatError, Sample, read
from mm_finetune.answers import Answer, Evaluation
from mm_finetune.errors import CheckpointError, ConfigError, DataError
from mm_finetune.images import ImageInputs, ImageReader
from mm_finetune.output import require_free_file
from mm_finetune.template import IMAGE, encode_prompt


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question as the model reads it; `images` is None without pictures."""

    input_ids: list[int]
    images: ImageInputs | None


def evaluate(
    hf_dir: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    dataset_dir: str | Path | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    overwrite: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Ask a model the last question of every record, and write down what it says.

    Args:
        hf_dir: the model: an ordinary Hugging Face folder of Qwen2.5-VL.
        data: records in a format of mm-datafmt; each ends with an answer.
        output: the JSON file to write.
        dataset_dir: the folder that pictures are relative to; default: the folder of `data`.
        batch_size: records that are answered together. It does not change the answers but for rounding.
        max_new_tokens: longest answer.
        overwrite: replace `output`.
        progress: show a bar, on a terminal.

    Raises:
        OutputExistsError: `output` is there already.
        ConfigError: a number that can't be, or `hf_dir` is no model folder.
        CheckpointError: the weights are not exactly those of the model.
        DataError: a record or a picture can't be used.
    """
    hf_dir, data, output = Path(hf_dir), Path(data), Path(output)
    require_free_file(output, overwrite=overwrite)
    if batch_size < 1 or max_new_tokens < 1:
        raise ConfigError(f"batch_size {batch_size} and max_new_tokens {max_new_tokens} must be 1 or more")
    root = data.parent if dataset_dir is None else Path(dataset_dir)
    samples = read_samples(data, root)
    answerer = Answerer(hf_dir, max_new_tokens=max_new_tokens)
    answers: list[Answer] = []
    for batch in _batches(samples, batch_size, progress):
        prompts = [answerer.prompt(sample, root) for sample in batch]
        answers += map(_judged, batch, answerer.answer(prompts))
    evaluation = Evaluation(model=str(hf_dir), dataset_dir=root, answers=answers)
    evaluation.save(output, overwrite=overwrite)
    return evaluation


def read_samples(data: Path, root: Path) -> list[Sample]:
    """All records, checked before anything expensive happens.

    Raises:
        DataError: a record is broken or does not end with an answer, or pictures are missing.
    """
    try:
        samples = list(read(data))
    except DataFormatError as error:
        raise DataError(str(error)) from error
    for number, sample in enumerate(samples, 1):
        roles = [message.role for message in sample.messages]
        if roles[-2:] != ["user", "assistant"]:
            raise DataError(f"record {number} of {data} does not end with a question and its answer: {roles}")
    missing = [str(root / path) for sample in samples for path in sample.images if not (root / path).is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(f"pictures missing: {', '.join(missing[:5])}{more}; is --dataset_dir right?")
    return samples


class Answerer:
    """A model with its tokenizer and image processor.

    Args:
        hf_dir: an ordinary Hugging Face folder of Qwen2.5-VL.
        max_new_tokens: longest answer.

    Raises:
        ConfigError: `hf_dir` is no model folder.
        CheckpointError: the weights are not exactly those of the model.
    """

    def __init__(self, hf_dir: Path, *, max_new_tokens: int) -> None:
        from transformers import AutoTokenizer, GenerationConfig

        if not (hf_dir / "config.json").is_file():
            raise ConfigError(f"{hf_dir} has no config.json; give the folder of a Qwen2.5-VL model")
        self.read_images = ImageReader(hf_dir)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model = load_model(hf_dir).to(device)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad_token_id: int = end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        # In place of the folder's, which may ask for sampling or penalties.
        self.model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=self.pad_token_id
        )

    def prompt(self, sample: Sample, root: Path) -> Prompt:
        """A record without its last answer, as the model reads it.

        Raises:
            DataError: the record or a picture can't be used.
        """
        images = self.read_images([root / path for path in sample.images]) if sample.images else None
        counts = images.token_counts if images else ()
        ids = encode_prompt(sample.messages[:-1], tokenizer=self.tokenizer, image_token_counts=counts)
        return Prompt(input_ids=ids, images=images)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """What the model says to each prompt: greedy, without special tokens and white space at the ends."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in self._inputs(prompts).items()}
        output = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Padded on the left: all answers begin at the same place."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        padding = [longest - len(prompt.input_ids) for prompt in prompts]
        rows = [[self.pad_token_id] * pad + prompt.input_ids for pad, prompt in zip(padding, prompts, strict=True)]
        input_ids = torch.tensor(rows)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(longest) >= torch.tensor(padding)[:, None]).long(),
        }
        # Where transformers knows this input, it gives pictures their rows and columns only if it is there.
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            inputs["mm_token_type_ids"] = (input_ids == self.model.config.image_token_id).int()
        images = [prompt.images for prompt in prompts if prompt.images]
        if images:
            inputs["pixel_values"] = torch.cat([one.pixel_values for one in images]).to(self.model.dtype)
            inputs["image_grid_thw"] = torch.cat([one.image_grid_thw for one in images])
        return inputs


def load_model(hf_dir: Path) -> Any:
    """Read a model, in the type it is stored in.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape, or the file is damaged.
    """
    from safetensors import SafetensorError
    from transformers import Qwen2_5_VLForConditionalGeneration

    try:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            hf_dir,
            dtype="auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
        )
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"the model in {hf_dir} can't be read: {error}") from error
    faults = [f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, info[kind]))[:5])}" for kind in info if info[kind]]
    if faults:
        raise CheckpointError(f"the weights in {hf_dir} are not those of its config.json; {'; '.join(faults)}")
    return model


def _batches(samples: Sequence[Sample], size: int, progress: bool) -> Iterator[Sequence[Sample]]:
    from tqdm import tqdm

    # disable=None: silent where there is no terminal.
    with tqdm(total=len(samples), unit="records", delay=2, disable=None if progress else True) as bar:
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            yield batch
            bar.update(len(batch))


def _judged(sample: Sample, prediction: str) -> Answer:
    question, answer = (message.content for message in sample.messages[-2:])
    return Answer(
        image=sample.images[0] if sample.images else None,
        question=question.replace(IMAGE, "").strip(),
        answer=answer,
        prediction=prediction,
        correct=prediction == answer.strip(),
    )
