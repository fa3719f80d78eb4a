"""Values of a configuration that can't be, each told with what is legal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_finetune.config import DataConfig, OptimizationConfig, TrainConfig

BELOW_ONE = math.nextafter(1, 0)

# Key, smallest, largest.
BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("train.global_batch_size", 1, math.inf),
    ("train.micro_batch_size", 1, math.inf),
    ("train.warmup_fraction", 0, 1),
    ("train.weight_decay", 0, math.inf),
    ("train.adam_beta1", 0, BELOW_ONE),
    ("train.adam_beta2", 0, BELOW_ONE),
    ("train.adam_eps", 0, math.inf),
    ("train.clip_grad", 0, math.inf),
    ("train.eval_every", 0, math.inf),
    ("train.eval_max_new_tokens", 1, math.inf),
    ("data.eval_samples", 0, math.inf),
    ("train.spike_factor", 0, math.inf),
    ("parallel.tp_size", 1, math.inf),
    ("parallel.pp_size", 1, math.inf),
    ("parallel.vpp_size", 1, math.inf),
    ("data.seq_length", 1, math.inf),
    ("data.max_samples", 1, math.inf),
    ("data.pack_length", 1, math.inf),
    ("data.pixel_cap", 1, math.inf),
    ("data.video_maxlen", 1, math.inf),
    ("data.video_max_pixels", 1, math.inf),
    ("data.max_bad_ratio", 0, 1),
    ("data.workers", 0, math.inf),
    ("data.prefetch_mib", 0, math.inf),
    ("data.cache_mib", 0, math.inf),
    ("data.decode_timeout_s", 0, math.inf),
    ("lora.r", 1, math.inf),
    ("lora.dropout", 0, 1),
    ("preference.label_smoothing", 0, 0.5),
    ("preference.sft_weight", 0, math.inf),
    ("output.save_every", 0, math.inf),
    ("output.keep_last", 0, math.inf),
    ("output.keep_best", 0, math.inf),
    ("output.log_every", 1, math.inf),
)


def faults_of(config: TrainConfig) -> list[str]:
    """Everything that is wrong, in words."""
    return [*_length_faults(config.train), *_bound_faults(config), *_value_faults(config)]


def _length_faults(train: OptimizationConfig) -> list[str]:
    if train.epochs is not None and train.steps:
        return ["train.steps and train.epochs are both given; keep one (train.epochs=null, or train.steps=0)"]
    if train.epochs is not None:
        return [] if train.epochs > 0 else [f"train.epochs is {train.epochs}; it must be above 0"]
    return [] if train.steps >= 1 else [f"train.steps is {train.steps}; it must be 1 or more, or give train.epochs"]


def _bound_faults(config: TrainConfig) -> list[str]:
    faults = []
    for key, low, high in BOUNDS:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name, None)
        if value is not None and not low <= value <= high:
            legal = f"be {low} or more" if high == math.inf else f"lie between {low} and {high}"
            legal = legal.replace(f"and {BELOW_ONE}", "and 1, and below 1")
            faults.append(f"{key} is {value}; it must {legal}")
    return faults


def _value_faults(config: TrainConfig) -> list[str]:
    train, output, faults = config.train, config.output, []
    if not 0 < train.lr < math.inf:
        faults.append(f"train.lr is {train.lr}; it must be above 0, and a number such as 1.0e-5")
    if not 0 <= train.min_lr <= train.lr:
        faults.append(f"train.min_lr is {train.min_lr}; it must lie between 0 and train.lr {train.lr}")
    if train.eval_every and config.data.eval_path is None:
        faults.append("train.eval_every needs data.eval_path, the held-out records that it asks about")
    if 0 < train.spike_factor <= 1:
        faults.append(f"train.spike_factor is {train.spike_factor}; it must be above 1, or 0 for no spikes")
    bad = {pattern: scale for pattern, scale in train.lr_scale.items() if not 0 <= scale < math.inf}
    if bad:
        faults.append(f"train.lr_scale is {bad}; factors must be 0 or more")
    if config.lora is not None and not config.lora.alpha > 0:
        faults.append(f"lora.alpha is {config.lora.alpha}; it must be above 0")
    if config.lora is not None and config.lora.dropout == 1:
        faults.append("lora.dropout is 1; nothing would be left, it must be below 1")
    if config.lora is not None and not config.lora.target_modules:
        faults.append("lora.target_modules is empty; name the layers that get an adapter")
    if output.peak_tflops is not None and not output.peak_tflops > 0:
        faults.append(f"output.peak_tflops is {output.peak_tflops}; it must be above 0")
    return faults + _data_faults(config.data) + _preference_faults(config)


def _preference_faults(config: TrainConfig) -> list[str]:
    preference, data, faults = config.preference, config.data, []
    if preference is None:
        return []
    if not 0 < preference.beta < math.inf:
        faults.append(f"preference.beta is {preference.beta}; it must be above 0")
    if preference.label_smoothing and preference.loss != "dpo":
        faults.append(f"preference.label_smoothing belongs to the loss dpo, not to {preference.loss}; leave it out")
    if data.truncate in ("trim_text", "drop_turns"):
        faults.append(f"data.truncate is {data.truncate}; answers of a pair are not cut: take error or drop")
    if data.train_on_prompt:
        faults.append("data.train_on_prompt means nothing with preference: the answers alone are compared")
    if config.train.loss != "token":
        faults.append(f"train.loss is {config.train.loss}; with preference the loss is a mean over pairs: leave it out")
    if config.lora and config.lora.dropout:
        faults.append(
            "lora.dropout must be 0 with preference: pairs are weighed by a pass of their own, of the same model"
        )
    if data.pack_length is not None and data.seq_length <= data.pack_length < 2 * data.seq_length:
        faults.append(
            f"data.pack_length {data.pack_length} is below twice data.seq_length {data.seq_length}: a row must hold any"
            " pair"
        )
    return faults


def _data_faults(data: DataConfig) -> list[str]:
    faults = []
    if data.pack_length is not None and data.pack_length < data.seq_length:
        faults.append(
            f"data.pack_length {data.pack_length} is below data.seq_length {data.seq_length}: a row must hold any"
            " record"
        )
    if data.mask_history and data.train_on_prompt:
        faults.append("data.mask_history and data.train_on_prompt exclude each other; set one of them")
    if not 0 < data.video_fps < math.inf:
        faults.append(f"data.video_fps is {data.video_fps}; it must be above 0")
    return faults
