"""A Hugging Face model that answers: generation is transformers' own, the model is read as anybody would read it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mm_finetune.config import DataConfig
from mm_finetune.errors import CheckpointError
from mm_finetune.evaluation.adapters import merge_adapter
from mm_finetune.evaluation.prompts import Prompt, PromptReader
from mm_finetune.families import model_class

END = "<|im_end|>"


class Answerer:
    """A model with its tokenizer and image processor.

    Args:
        hf_dir: an ordinary Hugging Face folder of Qwen2.5-VL or Qwen2-VL.
        max_new_tokens: longest answer.
        temperature: 0: always the likeliest token; above, tokens are drawn.
        data: limits of pictures and videos, of a training run; default: those of the model folder.
        adapter: a PEFT folder with a LoRA adapter, put into the weights.
        device: default: this machine's accelerator, or the CPU.

    Raises:
        ConfigError: `hf_dir` is no model folder.
        CheckpointError: the weights are not exactly those of the model, or the adapter does not fit it.
    """

    def __init__(
        self,
        hf_dir: Path,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        data: DataConfig | None = None,
        adapter: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        from transformers import GenerationConfig

        self.prompts = PromptReader(hf_dir, data)
        self.tokenizer: Any = self.prompts.tokenizer
        usual = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model = load_model(hf_dir)
        if adapter is not None:
            merge_adapter(self.model, adapter)
        self.model.to(device or usual)
        end = self.tokenizer.convert_tokens_to_ids(END)
        self.pad_token_id: int = end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        # In place of the folder's, which may ask for sampling or penalties.
        self.model.generation_config = GenerationConfig(
            **drawn, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=self.pad_token_id
        )

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], *, streamer: Any = None) -> list[str]:
        """What the model says to each prompt, without special tokens and white space at the ends.

        Args:
            prompts: at least one.
            streamer: one of transformers, which is told of tokens as they come; for one prompt.
        """
        inputs = {name: tensor.to(self.model.device) for name, tensor in self._inputs(prompts).items()}
        output = self.model.generate(**inputs, streamer=streamer)[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Padded on the left: all answers begin at the same place."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        padding = [longest - len(prompt.input_ids) for prompt in prompts]
        rows = [[self.pad_token_id] * blank + prompt.input_ids for blank, prompt in zip(padding, prompts, strict=True)]
        input_ids = torch.tensor(rows)
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        known, config = inspect.signature(self.model.forward).parameters, self.model.config
        # Where transformers knows this input, it gives pictures their rows and columns only if it is there.
        if "mm_token_type_ids" in known:
            kinds = (input_ids == config.image_token_id).int() + 2 * (input_ids == config.video_token_id).int()
            inputs["mm_token_type_ids"] = kinds.int()
            # Those of training: its own are others behind a long video, see mm_finetune.rope.
            seen = [pad(one.positions, (blank, 0)) for one, blank in zip(prompts, padding, strict=True)]
            counted = (mask.cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = torch.cat([counted[None], torch.stack(seen, dim=1)])
        images = [prompt.images for prompt in prompts if prompt.images]
        if images:
            inputs["pixel_values"] = torch.cat([one.pixel_values for one in images]).to(self.model.dtype)
            inputs["image_grid_thw"] = torch.cat([one.image_grid_thw for one in images])
        videos = [prompt.videos for prompt in prompts if prompt.videos]
        if videos:
            inputs["pixel_values_videos"] = torch.cat([one.pixel_values_videos for one in videos]).to(self.model.dtype)
            inputs["video_grid_thw"] = torch.cat([one.video_grid_thw for one in videos])
            if "second_per_grid_ts" in known:
                inputs["second_per_grid_ts"] = torch.tensor([s for one in videos for s in one.second_per_grid_ts])
        return inputs


def load_model(hf_dir: Path) -> Any:
    """Read a model, in the type it is stored in.

    Raises:
        ConfigError: it is no model that is trained here.
        CheckpointError: a tensor is missing, left over, of another shape, or the file is damaged.
    """
    from safetensors import SafetensorError

    try:
        model, info = model_class(hf_dir).from_pretrained(
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
