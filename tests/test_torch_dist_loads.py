"""megatron-core itself loads what mm-convert writes as ``torch_dist``, and mm-convert reads what megatron-core saves.

And transformers' models load what it writes for FSDP2 trainers.

Run as a script by torchrun, this file is the megatron-core side: two processes, tensor parallel and pipeline parallel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict

LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCABULARY = 3, 32, 4, 2, 48, 64
PADDED = 96  # a multiple of 48 times two ranks
IDS = torch.arange(10, 22).view(2, 6)
# Both sum float32 products in their own order: some times 2⁻²³ of logits around 1.
TOLERANCE = 2e-6
CONVERTER = "Qwen2_5Converter"


def hf_model(*, tied: bool = False) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    config = Qwen2Config(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of 1 and biases of 0 would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, our torch_dist folder of it, and what megatron-core made of that."""
    from mm_convert.convert import Converter
    from mm_convert.distributed.torch_dist import prepare_hf_to_torch_dist

    directory = tmp_path_factory.mktemp("torch_dist")
    hf_model().save_pretrained(directory / "hf")
    converter = Converter.named(CONVERTER)
    prepare_hf_to_torch_dist(converter, directory / "hf", directory / "ours").run()
    prepare_hf_to_torch_dist(
        converter, directory / "hf", directory / "padded", make_vocab_size_divisible_by=PADDED
    ).run()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    done = subprocess.run(
        [*command, str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return directory


@pytest.mark.parametrize(
    ("folder", "rows"),
    [("ours", VOCABULARY), ("padded", PADDED), ("ours", PADDED)],
    ids=["as many rows as tokens", "padded", "padded by megatron-core as it loads"],
)
def test_megatron_core_loads_it_and_computes_the_same_logits(made: Path, folder: str, rows: int) -> None:
    logits = torch.load(made / f"{folder}_{rows}.pt")
    assert logits.shape[-1] == rows
    torch.testing.assert_close(logits[..., :VOCABULARY], logits_of(hf_model()), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("saved", ["tensor_parallel", "one_by_one", "pipeline_parallel", "padded_again"])
def test_what_megatron_core_saves_comes_back_as_the_same_model(made: Path, saved: str) -> None:
    from transformers import AutoModelForCausalLM

    from mm_convert.convert import Converter
    from mm_convert.distributed.torch_dist import prepare_torch_dist_to_hf

    back = made / f"{saved}_hf"
    multiple = PADDED if saved == "padded_again" else 0
    prepare_torch_dist_to_hf(
        Converter.named(CONVERTER), made / saved, made / "hf", back, padded_to_multiple_of=multiple
    ).run()
    assert (back / "model.safetensors").read_bytes() == (made / "hf/model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(back).float().eval()
    assert torch.equal(logits_of(model), logits_of(hf_model()))


def vision_language_model(name: str) -> Any:
    import transformers

    from house import tiny_models as tiny

    if name == "qwen3_vl":
        return tiny.MODELS[name]().float().eval()
    # Of the recorded one only names and shapes count; this one can compute: half a head is one number.
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 0, 0]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**tiny.TEXT, "rope_parameters": rope}, vision_config=tiny.QWEN2_5_VISION, **tiny.TOKENS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()


@pytest.mark.parametrize(
    ("model", "converter", "published"),
    [("qwen2_5_vl", "Qwen2_5_VLConverter", True), ("qwen3_vl", "Qwen3VLMegatronConverter", False)],
)
def test_transformers_models_load_the_dcp_folder(tmp_path: Path, model: str, converter: str, published: bool) -> None:
    """As an FSDP2 trainer does: its own state dict, filled by torch.distributed.checkpoint."""
    from mm_convert.distributed.dcp import prepare_dcp_to_hf, prepare_hf_to_dcp
    from mm_convert.families import family

    torch.manual_seed(3)
    saved = vision_language_model(model)
    saved.save_pretrained(tmp_path / "hf")
    known = family(converter)
    # The published names of Qwen2.5-VL are older than those in transformers' memory.
    prepare_hf_to_dcp(tmp_path / "hf", tmp_path / "dcp", in_memory_names=published, family=known).run()
    fresh = vision_language_model(model)
    state = {"model": fresh.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is one process
        load_state_dict(state, checkpoint_id=tmp_path / "dcp/release")
    fresh.load_state_dict(state["model"])
    ids = torch.arange(10, 22).view(2, 6)
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, saved(ids).logits)
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    prepare_dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", tmp_path / "back", family=known).run()
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def main(directory: Path) -> None:
    """One of two ranks: load at TP=2, compute, save in two ways; load and save at PP=2; with a padded vocabulary."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from mm_finetune.engine.device import mcore_on

    torch.distributed.init_process_group("gloo")
    with mcore_on(torch.device("cpu")), torch.no_grad():
        for folder, rows, tp_size, pp_size, ways in (
            ("ours", VOCABULARY, 2, 1, ["tensor_parallel", "one_by_one"]),
            ("ours", VOCABULARY, 1, 2, ["pipeline_parallel"]),
            ("padded", PADDED, 2, 1, ["padded_again"]),
            ("ours", PADDED, 2, 1, []),
        ):
            parallel_state.initialize_model_parallel(tp_size, pp_size)
            model_parallel_cuda_manual_seed(0)
            model = gpt_model(tp_size, pp_size, rows)
            wanted = {"model": model.sharded_state_dict()}
            loaded = dist_checkpointing.load(wanted, str(directory / folder / "release"), strict="raise_unexpected")
            assert loaded["checkpoint_version"] == 3.0
            model.load_state_dict(loaded["model"])
            if tp_size == 2:
                save_logits(model, directory / f"{folder}_{rows}.pt")
            for way in ways:
                metadata = {"singleton_local_shards": way == "one_by_one"}
                if torch.distributed.get_rank() == 0:
                    (directory / way).mkdir()
                torch.distributed.barrier()
                saved = {"model": model.sharded_state_dict(metadata=metadata), "iteration": 1}
                dist_checkpointing.save(saved, str(directory / way))
            parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def gpt_model(tp_size: int, pp_size: int, rows: int) -> Any:
    """megatron-core's own language model, by its own specification, with other weights than those to load."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mm_finetune.engine.layers import CoreAttention

    off = ("bias_activation_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion")
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        add_bias_linear=False,
        add_qkv_bias=True,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        pipeline_model_parallel_layout=[["embedding", "decoder"], ["decoder", "decoder", "loss"]]
        if pp_size > 1
        else None,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        **dict.fromkeys((*off, "apply_rope_fusion", "persist_layer_norm"), False),
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    # Megatron's own attention draws from CUDA's random numbers; it holds no weights.
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    model = GPTModel(
        config,
        layer,
        vocab_size=rows,
        max_sequence_length=32,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=10000,
    )
    return model.float().eval()


def save_logits(model: Any, path: Path) -> None:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    whole = gather_from_tensor_model_parallel_region(model(IDS, torch.arange(IDS.shape[1]).expand_as(IDS), None))
    if torch.distributed.get_rank() == 0:
        torch.save(whole.clone(), path)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
