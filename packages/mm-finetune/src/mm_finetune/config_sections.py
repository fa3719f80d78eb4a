"""The sections of a configuration: every key, what it means and what it is when it is not given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model.

    Args:
        hf_dir: Hugging Face folder: configuration, tokenizer, image processor.
        load: Megatron-style folder with the weights, made by ``mm-convert … hf_to_mm``.
    """

    hf_dir: Path
    load: Path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data.

    Args:
        path: messages JSON, made by ``mm-datafmt convert``; with ``preference`` pairs as LLaMA-Factory or TRL has them.
        dataset_dir: folder that image paths are relative to; default: the folder of `path`.
        seq_length: longest sample in tokens; see `truncate`.
        truncate: what happens to a longer one; pictures always stay whole. ``error``: it is a bad record, see
            `on_bad`; ``drop``: left out; ``trim_text``: questions and answers are cut at their ends, by
            LLaMA-Factory's rule; ``drop_turns``: its last turns are left out.
        min_pixels: smallest picture in pixels; default: what the model folder says.
        max_pixels: largest picture in pixels; default: what the model folder says.
        pixel_cap: pictures above it are shrunk to it before anything else, as MindSpeed MM and LLaMA-Factory do
            (``image_max_pixels``); default: no such step.
        resample: how that step resizes; ``nearest`` is MindSpeed MM's, ``bicubic`` LLaMA-Factory's.
        video_fps: frames taken of a second of video.
        video_maxlen: most frames taken of a video.
        video_min_pixels: smallest frame in pixels; default: what the model folder says of pictures.
        video_max_pixels: largest frame in pixels.
        max_samples: use only the first N records.
        eval_path: held-out records that ``train.eval_every`` asks about, as in `path`; their pictures are relative to
            `dataset_dir` too, default: the folder of this file.
        eval_samples: how many of them, evenly over the file; 0: all. They stay in memory with their pixels.
        mask_history: only the last answer of a record carries loss.
        train_on_prompt: every token carries loss.
        packing: lay several records into one row; each attends to itself alone, and no token is padding.
        pack_length: longest row in tokens; default: `seq_length`, with ``preference`` twice that.
        on_bad: ``error``: a record that can't be used ends the run, before the first step where possible; ``skip``:
            it is left out and written to bad.jsonl.
        max_bad_ratio: with ``skip``, the largest share of bad records before the run ends all the same.
        workers: threads that read pictures ahead; 0: none, they are read when they are needed.
        prefetch_mib: most memory for pictures read ahead, in MiB.
        cache_mib: most memory for pictures kept, in MiB; a small data set is then decoded once.
        decode_timeout_s: seconds that a picture or video may take to decode before its record counts as bad; 0 is no
            limit, and without workers there is none. The thread can't be stopped: it is left behind, and replaced.
        cache_dir: folder that remembers the lengths of data sets; default: mm-finetune in the user's cache folder.
    """

    path: Path
    dataset_dir: Path | None = None
    seq_length: int = 1024
    truncate: Literal["error", "drop", "trim_text", "drop_turns"] = "error"
    min_pixels: int | None = None
    max_pixels: int | None = None
    pixel_cap: int | None = None
    resample: Literal["bicubic", "nearest"] = "bicubic"
    video_fps: float = 2.0
    video_maxlen: int = 64
    video_min_pixels: int | None = None
    video_max_pixels: int = 65536
    max_samples: int | None = None
    eval_path: Path | None = None
    eval_samples: int = 64
    mask_history: bool = False
    train_on_prompt: bool = False
    packing: bool = False
    pack_length: int | None = None
    on_bad: Literal["error", "skip"] = "error"
    max_bad_ratio: float = 0.1
    workers: int = 2
    prefetch_mib: int = 512
    cache_mib: int = 512
    decode_timeout_s: float = 60.0
    cache_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How to train.

    Args:
        steps: optimizer steps; or give `epochs`, and it is worked out from the number of records.
        epochs: how often every record is seen, rounded up to whole steps; a fraction is allowed.
        global_batch_size: samples a step, over all ranks; with ``preference`` pairs.
        micro_batch_size: samples a forward pass; with ``preference`` pairs.
        lr: peak learning rate.
        min_lr: learning rate that the cosine ends at.
        warmup_fraction: share of the steps in which the learning rate rises linearly from 0.
        weight_decay: AdamW's, on matrices only.
        adam_beta1: AdamW's.
        adam_beta2: AdamW's.
        adam_eps: AdamW's.
        clip_grad: largest norm of the gradient; 0 is no clipping.
        seed: order of the data.
        dtype: ``bf16``: computed in bfloat16, with fp32 weights in the optimizer; ``fp32``: all in float32.
        loss: ``token``: the mean over all tokens of the step that carry loss; ``sample``: the mean over its samples of
            each sample's own mean.
        recompute: what is computed again in the backward pass rather than kept. ``selective``: the MLPs, more than half
            of the activations; ``full``: whole layers, all but their inputs; costs about a fifth and a third more time.
        distributed_optimizer: cut the optimizer's state over the data-parallel ranks; the numbers stay the same.
        freeze: patterns of weights that are not trained, over the published names: ``visual.*``; ``*`` matches dots
            too.
        lr_scale: factors of the learning rate by pattern; where several match, the last counts.
        eval_every: steps between evaluations during the run, one more follows the last step; 0 is none. The model as it
            stands answers records of ``data.eval_path``; ``evals/`` holds the answers, the score and the loss.
        eval_max_new_tokens: longest answer then, in tokens; each costs a forward pass of all of them.
        eval_metric: how answers are judged: ``exact`` match, ``anls`` (DocVQA), ``relaxed`` (ChartQA), ``choice``.
        on_nan: what to do at a loss or gradient norm that is no number, or a spike. ``stop``: end the run before the
            weights are touched; ``skip``: leave this step's weights as they were. ``anomalies.jsonl`` names the
            samples.
        spike_factor: a loss above this many times the median of the last steps is a spike; 0 is off.
    """

    steps: int = 0
    epochs: float | None = None
    global_batch_size: int
    micro_batch_size: int = 1
    lr: float = 1e-5
    min_lr: float = 0.0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    loss: Literal["token", "sample"] = "token"
    recompute: Literal["none", "selective", "full"] = "none"
    distributed_optimizer: bool = True
    freeze: tuple[str, ...] = ()
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    eval_every: int = 0
    eval_max_new_tokens: int = 16
    eval_metric: Literal["exact", "anls", "relaxed", "choice"] = "exact"
    on_nan: Literal["stop", "skip"] = "stop"
    spike_factor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685); giving the section turns them on and freezes everything else.

    Args:
        r: rank.
        alpha: the adapter's output is scaled by ``alpha / r``.
        dropout: probability of zeroing an input of the adapter.
        target_modules: the linear layers that get one: patterns over the published names, ``*`` matches dots too; or
            the last part of a name, which means the language model's layers: the vision tower's are taken by patterns
            that name it, ``visual.*``.
        modules_to_save: layers that are trained in full beside the adapters and saved with them, as PEFT does it:
            patterns over the published names of layers or of what holds them, ``visual.merger``; or the last part of
            one outside the vision tower: ``lm_head``, ``embed_tokens``, ``norm``.
        load: PEFT's folder of an adapter to go on from; its rank, alpha and layers must be those given here.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    modules_to_save: tuple[str, ...] = ()
    load: Path | None = None


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Learn from pairs of answers, a better and a worse one; ``preference: dpo`` is short for ``{loss: dpo}``.

    With h the log-probability of the chosen answer less that of the rejected one, less the same of the reference
    model, which is the model before the first step:

    Args:
        loss: ``dpo``: ``-log sigmoid(beta h)`` (arXiv 2305.18290); ``hinge``: ``max(0, 1 - beta h)`` (arXiv
            2305.10425); ``ipo``: ``(h - 1 / (2 beta))**2`` (arXiv 2310.12036), of log-probabilities a token.
        beta: how strongly the model is held to the reference.
        label_smoothing: with ``dpo``, the share of pairs that are thought to be the wrong way round.
        sft_weight: weight of a second loss, the chosen answer's mean over its tokens (arXiv 2404.19733's alpha).
        reference_free: there is no reference model.
    """

    loss: Literal["dpo", "ipo", "hinge"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    reference_free: bool = False


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut; the data-parallel size is what the number of processes leaves.

    Args:
        tp_size: tensor-parallel size.
        pp_size: pipeline stages.
        vpp_size: parts of the model that a pipeline stage holds, interleaved with those of the others; 1: its layers
            stand together.
        sequence_parallel: between the layers' cut parts, cut the tokens over the tensor-parallel ranks: less memory
            for the same communication.
    """

    tp_size: int = 1
    pp_size: int = 1
    vpp_size: int = 1
    sequence_parallel: bool = False


Tracker = Literal["tensorboard", "wandb", "swanlab"]


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where it goes, and what is said meanwhile.

    Args:
        dir: folder of the run: config.yaml, metrics.jsonl, anomalies.jsonl, checkpoint/.
        overwrite: replace a finished run.
        save_every: steps between checkpoints; 0: only at the end. Also called ``save_interval``.
        async_save: checkpoints are written beside training, which only waits for copies in memory.
        keep_last: newest checkpoints that stay; 0: all, or with `keep_best` one.
        keep_best: best checkpoints that stay too: by the evaluation at their step, or where the run has none
            (``eval_every``), by the mean loss of the last 50 steps.
        resume: go on from the newest checkpoint of `dir`, where there is one.
        no_load_optim: take only the weights of a checkpoint: the optimizer starts anew.
        no_load_rng: don't take the random state of a checkpoint.
        no_save_optim: checkpoints without the optimizer's state. Resuming then needs `no_load_optim`.
        no_save_rng: checkpoints without the random state.
        log_format: ``plain``, or ``megatron``: the line that scripts for Megatron's log read.
        log_every: steps between lines; default: every step for ``megatron``, else one line in two seconds.
        log_tps: put the tokens of an average sample into the ``megatron`` line.
        peak_tflops: what a device can do at most in 1e12 floating point operations a second, for MFU; default: what
            its maker says, where that is known.
        trackers: also log to these; they must be installed.
        project: name of the project there.
    """

    dir: Path
    overwrite: bool = False
    save_every: int = 0
    async_save: bool = True
    keep_last: int = 0
    keep_best: int = 0
    resume: bool = False
    no_load_optim: bool = False
    no_load_rng: bool = False
    no_save_optim: bool = False
    no_save_rng: bool = False
    log_format: Literal["plain", "megatron"] = "plain"
    log_every: int | None = None
    log_tps: bool = False
    peak_tflops: float | None = None
    trackers: tuple[Tracker, ...] = ()
    project: str = "mm-finetune"
