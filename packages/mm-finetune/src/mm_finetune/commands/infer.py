"""``mm-finetune infer``: one question about pictures and videos, answered by a Hugging Face model."""

from __future__ import annotations

import argparse
import json
import sys
from math import inf
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="Hugging Face folder of the model")
    parser.add_argument("question", help="an <image> or <video> in it says where it stands; else they come first")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; repeatable")
    parser.add_argument("--video", type=Path, action="append", default=[], metavar="FILE", help="a video; repeatable")
    parser.add_argument("--system", help="system turn (default: the one of training)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer in tokens (default: 512)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token each time (default); above: drawn"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--adapter", type=Path, help="PEFT folder with a LoRA adapter for the model")
    parser.add_argument(
        "--train_config", type=Path, help="train.yaml of a run whose data section limits the size of pictures"
    )
    parser.add_argument("--stream", action="store_true", help="show words as they come")
    parser.add_argument("--json", action="store_true", help="print an object: answer, number of tokens, grids")


def run(args: argparse.Namespace) -> int:
    """Answer."""
    import torch
    from transformers import TextStreamer
    from transformers.utils import logging

    from mm_finetune.config import load_config
    from mm_finetune.errors import ConfigError
    from mm_finetune.evaluation.answerer import Answerer
    from mm_finetune.evaluation.prompts import limits_of
    from mm_finetune.evaluation.questions import question_of

    if args.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens is {args.max_new_tokens}; it must be 1 or more")
    if not 0 <= args.temperature < inf:
        raise ConfigError(f"--temperature is {args.temperature}; it must be 0 or more")
    if not 0 <= args.seed < 2**63:
        raise ConfigError(f"--seed is {args.seed}; it must lie between 0 and {2**63 - 1}")
    if not args.question.strip():
        raise ConfigError("the question is empty; ask something, in quotation marks")
    if args.stream and args.json:
        raise ConfigError("--stream and --json exclude each other")
    logging.disable_progress_bar()
    question = question_of(args.question, images=args.image, videos=args.video, system=args.system)
    answerer = Answerer(
        args.model,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        data=limits_of(load_config(args.train_config).data) if args.train_config else None,
        adapter=args.adapter,
    )
    prompt = answerer.prompts.read(answerer.prompts.outline(question))
    torch.manual_seed(args.seed)
    # It writes to stdout by itself.
    streamer: Any = TextStreamer(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,) = answerer.answer([prompt], streamer=streamer if args.stream else None)
    if args.json:
        told = {
            "answer": answer,
            "prompt_tokens": len(prompt.input_ids),
            "image_grid_thw": prompt.images.image_grid_thw.tolist() if prompt.images else [],
            "video_grid_thw": prompt.videos.video_grid_thw.tolist() if prompt.videos else [],
        }
        sys.stdout.write(json.dumps(told, ensure_ascii=False) + "\n")
    elif not args.stream:
        sys.stdout.write(answer + "\n")
    return 0
