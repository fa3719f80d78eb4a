"""MindSpeed MM's ``data.json`` for a file that was written here.

Its published example for Qwen2.5-VL names ``./data`` as ``dataset_dir`` while the pictures' paths are relative to the
folder below, so that every picture is skipped; here the two fit by construction. Values are those of that example.
"""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from .writer import part_of


def write_data_json(path: Path, *, dataset: Path, validation: Path | None, dataset_dir: Path) -> None:
    """Write the ``data.json`` that trains on ``dataset``; paths are relative to the current folder where they can be.

    ``model_name_or_path`` is the example's and yours to change. Raises ``OSError``.
    """
    basic: dict[str, object] = {
        "template": "qwen2vl",
        "dataset_dir": _relative(dataset_dir),
        "dataset": _relative(dataset),
        "cache_dir": _relative(dataset.parent / "cache_dir"),
        "train_on_prompt": False,
        "mask_history": False,
        "preprocessing_batch_size": 1000,
        "preprocessing_num_workers": 16,
        "max_samples": None,
        "tool_format": None,
    }
    if validation is not None:
        basic["val_dataset"] = _relative(validation)
    content = {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": "./ckpt/hf_path/Qwen2.5-VL-7B-Instruct",
                "use_fast_tokenizer": True,
                "split_special_tokens": False,
                "image_max_pixels": 262144,
                "image_min_pixels": 0,
                "video_max_pixels": 16384,
                "video_min_pixels": 0,
                "video_fps": 2.0,
                "video_maxlen": 64,
            },
            "basic_parameters": basic,
            "attr": {
                "system": None,
                "images": "images",
                "videos": "videos",
                "messages": "messages",
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "observation_tag": "observation",
                "function_tag": "function",
                "system_tag": "system",
            },
        },
        "dataloader_param": {
            "dataloader_mode": "sampler",
            "drop_last": True,
            "sampler_type": "BaseRandomBatchSampler",
            "collate_param": {"model_name": "qwen2vl", "ignore_pad_token_for_loss": True},
            "pin_memory": True,
            "shuffle": True,
        },
    }
    part = part_of(path)
    part.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    part.replace(path)


def _relative(path: Path) -> str:
    """Return a path as the trainer, started here, finds it."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - links must stay: data sets are linked together
    here = Path.cwd()
    return f"./{absolute.relative_to(here).as_posix()}" if absolute.is_relative_to(here) else absolute.as_posix()
