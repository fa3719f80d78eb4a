"""What each flag and field of MindSpeed MM is here. A rule is a key of ours, or words for the person who asks.

The meanings, and Megatron's defaults for flags that a script leaves out, are those of MindSpeed MM's examples for
Qwen2.5-VL and of Megatron's argument parser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["same", "differs", "ignored", "missing"]
HEADINGS: dict[Kind, str] = {
    "missing": "has no counterpart here",
    "differs": "is done differently here",
    "ignored": "is ignored by MindSpeed MM itself",
    "same": "needs no setting here",
}


@dataclass(frozen=True, kw_only=True)
class Remark:
    """A flag or field that did not become a key, and why."""

    kind: Kind
    item: str
    why: str


@dataclass(frozen=True)
class Key:
    """A flag or field that is a key of ours; `read` makes its value, None leaves the key out."""

    name: str
    read: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Words:
    """A flag or field that is no key. With `usual`, `kind` and `why` are for other values only; those are the same."""

    kind: Kind
    why: str
    usual: Sequence[Any] | None = None


Rule = Key | Words


def _switch(key: str, value: Any = True) -> Key:
    return Key(key, lambda _: value)


def _positive(value: Any) -> int | None:
    return int(value) if int(value) > 0 else None


MODULES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
_STRUCTURE = Words("ignored", "the field of the same name in model.json wins; here hf_dir/config.json says it")
_ALWAYS = Words("same", "always so here, or chosen by itself")
_LAUNCH = Words("same", "torchrun and hccl, nccl or gloo are used as they are")
_VALIDATION = Words("missing", "there is no loss on validation data; train.eval_every lets the model answer questions")
_CONTEXT = Words("missing", "there is no context parallelism; the sequence is cut by parallel.sequence_parallel only")

FLAGS: dict[str, Rule] = {
    "--tensor-model-parallel-size": Key("parallel.tp_size", int),
    "--pipeline-model-parallel-size": Key("parallel.pp_size", int),
    "--sequence-parallel": _switch("parallel.sequence_parallel"),
    "--micro-batch-size": Key("train.micro_batch_size", int),
    "--global-batch-size": Key("train.global_batch_size", int),
    "--seq-length": Key("data.seq_length", int),
    "--train-iters": Key("train.steps", int),
    "--lr": Key("train.lr", float),
    "--min-lr": Key("train.min_lr", float),
    "--lr-warmup-fraction": Key("train.warmup_fraction", float),
    "--weight-decay": Key("train.weight_decay", float),
    "--clip-grad": Key("train.clip_grad", float),
    "--adam-beta1": Key("train.adam_beta1", float),
    "--adam-beta2": Key("train.adam_beta2", float),
    "--adam-eps": Key("train.adam_eps", float),
    "--seed": Key("train.seed", int),
    "--bf16": _switch("train.dtype", "bf16"),
    "--use-distributed-optimizer": _switch("train.distributed_optimizer"),
    "--calculate-per-token-loss": _switch("train.loss", "token"),
    "--calculate-per-sample-loss": _switch("train.loss", "sample"),
    "--recompute-granularity": Key("train.recompute", str),
    "--load": Key("model.load", str),
    "--save": Key("output.dir", str),
    "--save-interval": Key("output.save_every", int),
    "--log-interval": Key("output.log_every", int),
    "--log-tps": _switch("output.log_tps"),
    "--no-load-optim": _switch("output.no_load_optim"),
    "--no-load-rng": _switch("output.no_load_rng"),
    "--no-save-optim": _switch("output.no_save_optim"),
    "--no-save-rng": _switch("output.no_save_rng"),
    "--tensorboard-dir": _switch("output.trackers", ["tensorboard"]),
    "--num-workers": Key("data.workers", int),
    "--lora-r": Key("lora.r", int),
    "--lora-alpha": Key("lora.alpha", float),
    "--lora-dropout": Key("lora.dropout", float),
    "--lr-decay-style": Words("missing", "the learning rate falls as a cosine", ("cosine",)),
    "--context-parallel-size": Words(_CONTEXT.kind, _CONTEXT.why, ("1",)),
    "--context-parallel-algo": Words("ignored", "it matters above --context-parallel-size 1 only"),
    "--fp16": Words("missing", "train.dtype is bf16 or fp32"),
    "--optimizer": Words("missing", "the optimizer is AdamW", ("adam",)),
    "--eval-interval": _VALIDATION,
    "--eval-iters": _VALIDATION,
    "--distributed-timeout-minutes": Words("missing", "torch's own time limit holds"),
    "--lora-apply-modules": Words("missing", "lora.target_modules takes patterns over the published names"),
    "--lora-mixed-training": Words("missing", "lora.modules_to_save names what trains in full beside the adapters"),
    "--load-base-model": Words("same", "model.load is the base model, the adapter is made anew"),
    "--recompute-method": Words("missing", "train.recompute full computes every layer again", ("uniform", "block")),
    "--recompute-num-layers": Words("missing", "train.recompute full computes every layer again"),
    "--weight-decay-exclude-modules": Words("missing", "weight decay is for matrices only"),
    "--lr-scale-modules": Words("missing", "write train.lr_scale: patterns and factors"),
    "--lr-mult": Words("missing", "write train.lr_scale: patterns and factors"),
    "--log-throughput": Words("differs", "tokens/s, samples/s and MFU are always said"),
    "--no-gradient-accumulation-fusion": _ALWAYS,
    "--ckpt-format": Words("differs", "checkpoints have the format of this package; mm-convert reads the weights"),
    **dict.fromkeys((
        "--use-mcore-models", "--use-flash-attn", "--use-fused-rmsnorm", "--use-fused-swiglu",
        "--use-fused-rotary-pos-emb", "--no-masked-softmax-fusion", "--variable-seq-lengths",
        "--tokenizer-type", "--overlap-grad-reduce", "--overlap-param-gather", "--manual-gc",
        "--manual-gc-interval", "--use-cpu-initialization", "--enable-dummy-optimizer", "--mm-data",
        "--mm-model", "--mm-tool", "--transformer-impl",
    ), _ALWAYS),
    **dict.fromkeys((
        "--distributed-backend", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port",
    ), _LAUNCH),
    **dict.fromkeys((
        "--normalization", "--swiglu", "--vocab-size", "--make-vocab-size-divisible-by", "--num-layers",
        "--hidden-size", "--ffn-hidden-size", "--num-attention-heads", "--group-query-attention",
        "--num-query-groups", "--position-embedding-type", "--rotary-base", "--add-qkv-bias",
        "--disable-bias-linear", "--norm-epsilon", "--untie-embeddings-and-output-weights",
        "--max-position-embeddings", "--attention-dropout", "--hidden-dropout", "--attention-softmax-in-fp32",
    ), _STRUCTURE),
}  # fmt: skip

# What a flag that is not given means to Megatron.
DEFAULTS: dict[str, Any] = {
    "train.micro_batch_size": 1,
    "train.min_lr": 0.0,
    "train.warmup_fraction": 0.0,
    "train.weight_decay": 0.01,
    "train.clip_grad": 1.0,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_eps": 1e-8,
    "train.seed": 1234,
    "train.distributed_optimizer": False,
    "output.dir": "run",
}

_OFF = (None, False)
_PROCESSOR = Words("missing", "the tokenizer and the picture processor are those of hf_dir", (*_OFF, True))

DATA: dict[str, Rule] = {
    "dataset_param.dataset_type": Words("missing", "only this data is read", ("huggingface",)),
    "preprocess_parameters.model_name_or_path": Key("model.hf_dir", str),
    "preprocess_parameters.image_max_pixels": Key("data.pixel_cap", int),
    "preprocess_parameters.image_min_pixels": Words("missing", "pictures are enlarged to data.min_pixels", (0,)),
    "preprocess_parameters.video_max_pixels": Key("data.video_max_pixels", int),
    "preprocess_parameters.video_min_pixels": Key("data.video_min_pixels", _positive),
    "preprocess_parameters.video_fps": Key("data.video_fps", float),
    "preprocess_parameters.video_maxlen": Key("data.video_maxlen", int),
    "preprocess_parameters.use_fast_tokenizer": _PROCESSOR,
    "preprocess_parameters.split_special_tokens": Words("missing", "special tokens in a text stay text", _OFF),
    "preprocess_parameters.trust_remote_code": Words("missing", "no code of a model folder is run", _OFF),
    "basic_parameters.template": Words("missing", "the template is Qwen2-VL's", ("qwen2vl",)),
    "basic_parameters.dataset_dir": Key("data.dataset_dir", str),
    "basic_parameters.dataset": Key("data.path", str),
    "basic_parameters.cache_dir": Key("data.cache_dir", str),
    "basic_parameters.train_on_prompt": Key("data.train_on_prompt"),
    "basic_parameters.mask_history": Key("data.mask_history"),
    "basic_parameters.max_samples": Key("data.max_samples"),
    "basic_parameters.packing": Key("data.packing"),
    "basic_parameters.preprocessing_batch_size": Words("same", "nothing is prepared before training"),
    "basic_parameters.preprocessing_num_workers": Words("same", "nothing is prepared before training"),
    "basic_parameters.overwrite_cache": Words("same", "what is remembered belongs to the file's content"),
    "basic_parameters.cutoff_len": Words("ignored", "it is an error there; --seq-length counts"),
    "dataloader_param.dataloader_mode": Words("same", "the order is seeded, whatever the number of processes"),
    "dataloader_param.sampler_type": Words("missing", "the order is a seeded permutation", ("BaseRandomBatchSampler",)),
    "dataloader_param.shuffle": Words("missing", "the order is always shuffled, by train.seed", (True,)),
    "dataloader_param.drop_last": Words("missing", "a step always has its full batch", (True,)),
    "dataloader_param.pin_memory": _ALWAYS,
    "dataloader_param.collate_param.model_name": Words("missing", "records are batched as Qwen2-VL's", ("qwen2vl",)),
    "dataloader_param.collate_param.ignore_pad_token_for_loss": Words("missing", "padding never carries loss", (True,)),
}  # fmt: skip

# Columns and tags that the records of mm-datafmt have.
ATTRIBUTES = {
    "images": "images", "videos": "videos", "messages": "messages", "role_tag": "role", "content_tag": "content",
    "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "formatting": "sharegpt",
}  # fmt: skip
