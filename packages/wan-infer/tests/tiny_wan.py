"""Tiny checkpoints with random weights: the original layout written by hand, the diffusers one by its own libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from peer_transformer import empty_peer
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from wan_infer.config import TransformerConfig, VaeConfig
from wan_infer.transformer import WanTransformer
from wan_infer.vae import WanVae

T5 = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.1_VAE.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WORDS = ["<pad>", "</s>", "<unk>", "the", "digit", "moves", "left", "up", "3", "7", "a", "b"]
MODEL_TYPES = ("t2v", "i2v", "flf2v", "vace")

_SHAPE: dict[str, Any] = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 3, "text_dim": 16, "freq_dim": 32}
_IMAGE: dict[str, Any] = {"in_dim": 36, "image_dim": 160}
TRANSFORMERS = {
    "t2v": TransformerConfig(**_SHAPE),
    "i2v": TransformerConfig(model_type="i2v", **_SHAPE, **_IMAGE),
    "flf2v": TransformerConfig(model_type="flf2v", **_SHAPE, **_IMAGE, image_tokens=10),
    "vace": TransformerConfig(model_type="vace", **_SHAPE, vace_layers=(0, 2), vace_in_dim=6),
}
VAE_CONFIG = VaeConfig(base_dim=4, num_res_blocks=1)


def original(path: Path, model_type: str = "t2v", *, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    """A whole checkpoint of the original layout; the text encoder is bfloat16, as published."""
    path.mkdir(parents=True)
    config = TRANSFORMERS[model_type]
    write_original_transformer(path, config, dtype, shards)
    torch.save(random_like(WanVae(VAE_CONFIG).state_dict(), 1), path / VAE)
    torch.save(t5_tensors(torch.bfloat16), path / T5)
    write_tokenizer(path / "google" / "umt5-xxl")
    if config.image_dim:
        torch.save(clip_tensors(), path / CLIP)
        write_tokenizer(path / "xlm-roberta-large")
    return path


def write_original_transformer(path: Path, config: TransformerConfig, dtype: torch.dtype, shards: int) -> None:
    tensors = random_like(WanTransformer(config).state_dict(), 0, dtype)
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(tensors, path / f"{stem}.safetensors")
    else:
        files = [f"{stem}-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
        names = sorted(tensors)
        for number, file in enumerate(files):
            save_file({name: tensors[name] for name in names[number::shards]}, path / file)
        weight_map = {name: files[n % shards] for n, name in enumerate(names)}
        (path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    values: dict[str, Any] = {
        "_class_name": "WanModel",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_dim,
        "model_type": config.model_type,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_dim,
        "text_len": 512,
    }
    if config.model_type == "vace":
        values |= {"vace_layers": list(config.vace_layers), "vace_in_dim": config.vace_in_dim}
    (path / "config.json").write_text(json.dumps(values))


def diffusers(path: Path, model_type: str = "t2v", *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A whole checkpoint of the diffusers layout, every part saved by the library that reads it."""
    torch.manual_seed(2)
    config = TRANSFORMERS[model_type]
    peer: Any = empty_peer(config).to(dtype)
    peer.save_pretrained(path / "transformer", max_shard_size=shard)
    AutoencoderKLWan(base_dim=4, num_res_blocks=1).save_pretrained(path / "vae")
    umt5().to(dtype).save_pretrained(path / "text_encoder", max_shard_size=shard)
    write_tokenizer(path / "tokenizer")
    if config.image_dim:
        clip().save_pretrained(path / "image_encoder")
    (path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return path


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(WORDS),
            d_model=16,
            d_kv=6,
            d_ff=20,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def clip() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=160,
            intermediate_size=32,
            projection_dim=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            hidden_act="gelu",
        )
    ).eval()


def random_like(tensors: dict[str, Tensor], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator).mul(0.2).to(dtype) for name, value in tensors.items()}


def t5_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of an original encoder: 16 wide, 4 heads of 6, feed-forward of 20, 2 layers."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (len(WORDS), 16), "norm.weight": (16,)}
    for layer in range(2):
        block = {
            **{f"attn.{letter}": (24, 16) for letter in "qkv"},
            "attn.o": (16, 24),
            "pos_embedding.embedding": (32, 4),
            "norm1": (16,),
            "norm2": (16,),
            "ffn.gate.0": (20, 16),
            "ffn.fc1": (20, 16),
            "ffn.fc2": (16, 20),
        }
        shapes |= {f"blocks.{layer}.{name}.weight": shape for name, shape in block.items()}
    return random_like({name: torch.empty(shape) for name, shape in shapes.items()}, 3, dtype)


def clip_tensors() -> dict[str, Tensor]:
    """The tensors of an original CLIP: an image tower of 160, 2 heads, 3 layers, and a text tower that nobody uses."""
    shapes: dict[str, tuple[int, ...]] = {
        "log_scale": (),
        "textual.token_embedding.weight": (7, 5),
        "visual.cls_embedding": (1, 1, 160),
        "visual.pos_embedding": (1, 5, 160),
        "visual.patch_embedding.weight": (160, 3, 14, 14),
        "visual.head": (160, 12),
    }
    linear = {"attn.to_qkv": (480, 160), "attn.proj": (160, 160), "mlp.0": (32, 160), "mlp.2": (160, 32)}
    for layer in range(3):
        for name, shape in linear.items():
            shapes[f"visual.transformer.{layer}.{name}.weight"] = shape
            shapes[f"visual.transformer.{layer}.{name}.bias"] = shape[:1]
    norms = [f"transformer.{layer}.norm{n}" for layer in range(3) for n in (1, 2)]
    for name in ("pre_norm", "post_norm", *norms):
        shapes |= {f"visual.{name}.{leaf}": (160,) for leaf in ("weight", "bias")}
    return random_like({name: torch.empty(shape) for name, shape in shapes.items()}, 4, torch.float16)


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
