"""Examples written from the published fields and flags of MindSpeed MM's Qwen2.5-VL folder, 3B and 7B."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm_finetune.cli import main
from mm_finetune.config import TrainConfig, load_config
from mm_finetune.config_tree import section_of
from mm_finetune.errors import DataError
from mm_finetune.mindspeed import Imported, import_example, training_arguments
from mm_finetune.mindspeed.tables import DATA, DEFAULTS, FLAGS, Key

SCRIPT = r"""#!/bin/bash
source /usr/local/Ascend/cann/set_env.sh
export CUDA_DEVICE_MAX_CONNECTIONS=1
export HCCL_CONNECT_TIMEOUT=1200
NPUS_PER_NODE=8
MASTER_ADDR=localhost
MASTER_PORT=6000
NNODES=1
NODE_RANK=0
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))

MM_DATA="./examples/qwen2.5vl/data_7b.json"
MM_MODEL="./examples/qwen2.5vl/model_7b.json"
MM_TOOL="./mindspeed_mm/tools/tools.json"
LOAD_PATH="ckpt/mm_path/Qwen2.5-VL-7B-Instruct"
SAVE_PATH="save_dir"

TP=1
PP=2
CP=1
MBS=1
GRAD_ACC_STEP=48
DP=$(($WORLD_SIZE/$TP/$PP/$CP))
GBS=$(($MBS*$GRAD_ACC_STEP*$DP))

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK
"
# --this-is-a-comment 1
GPT_ARGS="
    --use-mcore-models \
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --context-parallel-size ${CP} \
    --context-parallel-algo ulysses_cp_algo \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --tokenizer-type NullTokenizer \
    --vocab-size 152064 \
    --seq-length 1024 \
    --make-vocab-size-divisible-by 1 \
    --normalization RMSNorm \
    --use-fused-rmsnorm \
    --swiglu \
    --use-fused-swiglu \
    --no-masked-softmax-fusion \
    --use-flash-attn \
    --lr 1.0e-5 \
    --lr-decay-style cosine \
    --weight-decay 0 \
    --train-iters 10000 \
    --lr-warmup-fraction 0.1 \
    --clip-grad 0.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --seed 42 \
    --bf16 \
    --load $LOAD_PATH \
    --variable-seq-lengths \
    --use-distributed-optimizer \
    --no-load-optim \
    --no-load-rng \
    --no-save-optim \
    --no-save-rng \
    --num-workers 8 \
    --distributed-timeout-minutes 20
"
MM_ARGS="
    --mm-data ${MM_DATA} \
    --mm-model ${MM_MODEL} \
    --mm-tool ${MM_TOOL}
"
OUTPUT_ARGS="
    --log-interval 1 \
    --save-interval 10000 \
    --eval-interval 10000 \
    --eval-iters 5000 \
    --save ${SAVE_PATH} \
    --ckpt-format torch \
    --log-tps
"
logfile=$(date +%Y%m%d)_$(date +%H%M%S)
mkdir -p logs
torchrun $DISTRIBUTED_ARGS pretrain_vlm.py \
    $GPT_ARGS \
    $MM_ARGS \
    $OUTPUT_ARGS \
    --distributed-backend nccl \
    2>&1 | tee logs/train_${logfile}.log
chmod 440 logs/train_${logfile}.log
"""


def data(name: str) -> dict[str, Any]:
    return {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": f"./ckpt/hf_path/{name}",
                "use_fast_tokenizer": True, "split_special_tokens": False,
                "image_max_pixels": 262144, "image_min_pixels": 0,
                "video_max_pixels": 16384, "video_min_pixels": 0, "video_fps": 2.0, "video_maxlen": 64,
            },
            "basic_parameters": {
                "template": "qwen2vl", "dataset_dir": "./data",
                "dataset": "./data/mllm_format_llava_instruct_data.json", "cache_dir": "./data/cache_dir",
                "train_on_prompt": False, "mask_history": False, "preprocessing_batch_size": 1000,
                "preprocessing_num_workers": 16, "max_samples": None, "tool_format": None,
            },
            "attr": {
                "system": None, "images": "images", "videos": None, "messages": "messages", "role_tag": "role",
                "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "observation_tag": None,
                "function_tag": None, "system_tag": None, "ranking": None,
            },
        },
        "dataloader_param": {
            "dataloader_mode": "sampler", "drop_last": True, "sampler_type": "BaseRandomBatchSampler",
            "collate_param": {"model_name": "qwen2vl", "ignore_pad_token_for_loss": True},
            "pin_memory": True, "shuffle": True,
        },
    }  # fmt: skip


def model(*, llm: list[int], vit: list[int]) -> dict[str, Any]:
    return {
        "model_id": "qwen2_5vl",
        "img_context_token_id": 151655,
        "vision_start_token_id": 151652,
        "image_encoder": {
            "vision_encoder": {
                "model_id": "qwen2vit", "num_layers": 32, "hidden_size": 1280, "freeze": True,
                "pipeline_num_layers": vit,
            },
            "vision_projector": {"model_id": "lnmlp", "freeze": True},
        },
        "text_decoder": {"num_layers": sum(llm), "pipeline_num_layers": llm, "rope_theta": 1e6, "bf16": True},
        "text_encoder": None,
        "video_encoder": None,
    }  # fmt: skip


class Example:
    """The three files in a folder, with a folder beside them for the YAML."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.script = folder, SCRIPT
        self.data = data("Qwen2.5-VL-7B-Instruct")
        self.model = model(llm=[12, 16], vit=[32, 0])

    def paths(self) -> list[Path]:
        texts = {"data.json": json.dumps(self.data), "model.json": json.dumps(self.model), "run.sh": self.script}
        for name, text in texts.items():
            (self.folder / name).write_text(text)
        return [self.folder / name for name in texts]

    def read(self) -> Imported:
        return import_example(*self.paths(), beside=self.folder / "train.yaml")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    monkeypatch.chdir(tmp_path)
    return Example(tmp_path)


def why(imported: Imported, item: str) -> tuple[str, str]:
    (found,) = [remark for remark in imported.remarks if remark.item.startswith(item)]
    return found.kind, found.why


def test_the_7b_example(example: Example) -> None:
    folder = example.folder
    assert main(["import-mindspeed", *map(str, example.paths()), "-o", "train.yaml"]) == 0
    text = (folder / "train.yaml").read_text()
    assert len(text.splitlines()) <= 15
    config = load_config(folder / "train.yaml")
    assert config.model.hf_dir == folder / "ckpt/hf_path/Qwen2.5-VL-7B-Instruct"
    assert config.model.load == folder / "ckpt/mm_path/Qwen2.5-VL-7B-Instruct"
    assert config.data.path == folder / "data/mllm_format_llava_instruct_data.json"
    assert (config.data.dataset_dir, config.data.seq_length) == (folder / "data", 1024)
    assert (config.data.pixel_cap, config.data.resample, config.data.truncate) == (262144, "nearest", "trim_text")
    assert (config.data.video_max_pixels, config.data.video_maxlen, config.data.on_bad) == (16384, 64, "skip")
    train = config.train
    assert train.global_batch_size == 192, "1 x 48 x (8 / 1 / 2 / 1)"
    assert (train.micro_batch_size, train.steps, train.lr, train.warmup_fraction) == (1, 10000, 1e-5, 0.1)
    assert (train.weight_decay, train.clip_grad, train.seed, train.dtype) == (0, 0, 42, "bf16")
    assert train.distributed_optimizer
    assert train.freeze == ("visual.*",)
    assert train.loss == "sample", "a micro-batch of one sample, averaged over micro-batches"
    assert (config.parallel.tp_size, config.parallel.pp_size) == (1, 2)
    output = config.output
    assert (output.dir, output.save_every, output.log_every, output.log_tps) == (folder / "save_dir", 10000, 1, True)
    assert output.no_load_optim
    assert output.no_load_rng
    assert output.no_save_optim
    assert output.no_save_rng


def test_the_3b_example(example: Example) -> None:
    example.data = data("Qwen2.5-VL-3B-Instruct")
    example.model = model(llm=[36], vit=[32])
    example.script = (
        SCRIPT.replace("PP=2", "PP=1")
        .replace("GRAD_ACC_STEP=48", "GRAD_ACC_STEP=32")
        .replace("152064", "151936")
        .replace("7B", "3B")
        .replace("    --bf16 ", "    --bf16 \\\n    --no-gradient-accumulation-fusion ")
        .replace("\n", "\r\n")
    )
    tree = yaml.safe_load(example.read().yaml)
    assert tree["train"]["global_batch_size"] == 32 * 8
    assert "parallel" not in tree, "one by one is the default"
    assert tree["model"] == {
        "hf_dir": "ckpt/hf_path/Qwen2.5-VL-3B-Instruct",
        "load": "ckpt/mm_path/Qwen2.5-VL-3B-Instruct",
    }


def test_every_flag_and_field_is_accounted_for(example: Example) -> None:
    imported = example.read()
    words = imported.describe()
    assert why(imported, "--normalization RMSNorm")[0] == "ignored"
    assert why(imported, "--vocab-size 152064")[0] == "ignored"
    assert why(imported, "--eval-iters 5000")[0] == "missing"
    assert why(imported, "--distributed-timeout-minutes 20")[0] == "missing"
    assert why(imported, "--context-parallel-size 1") == ("same", "always so here")
    assert "llm_pp_layers [[12,16]]" in words
    assert "vit_pp_layers [[32,0]]" in words
    assert "text_decoder.rope_theta" in words
    assert "not known here" not in words, "every published flag and field is in the tables"
    assert words.index("has no counterpart") < words.index("is ignored by MindSpeed MM itself")
    said = {remark.item.split()[0].rstrip(":") for remark in imported.remarks}
    flags = {flag for flag in training_arguments(SCRIPT) if not isinstance(FLAGS[flag], Key)}
    assert flags <= said


def test_what_has_no_counterpart_is_listed_with_its_value(example: Example) -> None:
    example.data["dataset_param"]["basic_parameters"]["dataset"] = "a.json,b.json"
    example.data["dataset_param"]["attr"]["user_tag"] = "human"
    example.data["dataset_param"]["basic_parameters"]["novelty"] = 3
    example.model["image_encoder"]["vision_projector"]["freeze"] = False
    example.script = SCRIPT.replace("--lr-decay-style cosine", "--lr-decay-style linear").replace(
        "--log-tps", "--log-tps --muon-momentum 0.95 --lora-r 8 --lora-target-modules linear_qkv linear_fc2"
    )
    imported = example.read()
    assert why(imported, "--lr-decay-style linear") == ("missing", "the learning rate falls as a cosine")
    assert why(imported, "--muon-momentum 0.95") == ("missing", "it is not known here")
    assert why(imported, "dataset_param.attr.user_tag: human")[0] == "missing"
    assert why(imported, "dataset_param.basic_parameters.novelty: 3")[0] == "missing"
    assert why(imported, "dataset_param.basic_parameters.dataset: b.json")[0] == "missing"
    assert imported.tree["data"]["path"] == "a.json"
    assert imported.tree["train"]["freeze"] == ["visual.patch_embed.*", "visual.blocks.*"], "the projector trains"
    assert imported.tree["lora"]["target_modules"] == ["q_proj", "k_proj", "v_proj", "down_proj"]


def test_flags_that_are_left_out_mean_megatrons_defaults(example: Example) -> None:
    for flag in (
        "--weight-decay 0 ",
        "--clip-grad 0.0 ",
        "--seed 42 ",
        "--lr-warmup-fraction 0.1 ",
        "--use-distributed-optimizer ",
    ):
        assert flag in example.script
        example.script = example.script.replace(flag, "")
    train = example.read().tree["train"]
    assert (train["weight_decay"], train["seed"], train["warmup_fraction"]) == (0.01, 1234, 0.0)
    assert train["distributed_optimizer"] is False
    assert "clip_grad" not in train, "1.0 there, and here"


def test_paths_are_kept_when_the_file_stands_elsewhere(example: Example) -> None:
    (example.folder / "configs").mkdir()
    imported = import_example(*example.paths(), beside=example.folder / "configs/train.yaml")
    assert imported.tree["output"]["dir"] == "../save_dir"


def test_every_target_of_the_tables_is_a_key() -> None:
    targets = {rule.name for rule in [*FLAGS.values(), *DATA.values()] if isinstance(rule, Key)} | DEFAULTS.keys()
    for target in targets:
        section, name = target.split(".")
        assert name in {item.name for item in fields(section_of(TrainConfig, section))}, target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run.sh": "echo nothing"}, "no line 'torchrun"),
        ({"run.sh": "torchrun a.py --lr fast"}, "--lr fast: this is not a value for train.lr"),
        ({"run.sh": "torchrun a.py --global-batch-size $GBS"}, r"--global-batch-size \$GBS: this is not a value"),
        ({"run.sh": "torchrun a.py 'x"}, "can't be read"),
        ({"data.json": "[1]"}, "data.json must hold an object"),
        ({"data.json": "{}"}, "data.json holds no dataset_param, as the data.json of an example does$"),
        ({"data.json": "{}", "model.json": '{"dataset_param": {}}'}, "model.json does: give it first"),
        ({"model.json": "{"}, "model.json is no JSON"),
    ],
)
def test_files_that_are_something_else(change: dict[str, str], words: str, example: Example) -> None:
    paths = example.paths()
    for name, text in change.items():
        (example.folder / name).write_text(text)
    with pytest.raises(DataError, match=words):
        import_example(*paths, beside="train.yaml")


def test_a_script_is_read_not_run(tmp_path: Path) -> None:
    text = (
        f"A=$(touch {tmp_path}/ran)\nB=$((2**3))\nC=${{D:-4}}\ntorchrun x.py --a $A --b $B --c $C --d=$((C*2+1)) > log"
    )
    assert training_arguments(text)["--d"] == ["9"]
    assert training_arguments(text)["--c"] == ["4"]
    assert training_arguments(text)["--b"] == ["$((2**3))"]
    assert not (tmp_path / "ran").exists()
