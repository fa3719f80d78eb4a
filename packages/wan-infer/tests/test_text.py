"""Cleaning, tokens, the encoder against two references, and the cache."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny_wan
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan_infer.checkpoints.convert import convert
from wan_infer.checkpoints.loading import encoder_fingerprint, load_prompt_encoder, load_text_encoder
from wan_infer.errors import CheckpointError
from wan_infer.text import clean_prompt, load_tokenizer

PROMPTS = ["the digit 7 moves up", "a", "the digit 3 moves left b a 3"]


def bucket(offset: int) -> int:
    """Of 32: 16 for either direction, 8 of them exact, 8 logarithmic up to 128 (arXiv 1910.10683)."""
    distance = abs(offset)
    if distance >= 8:
        distance = min(15, 8 + int(math.log(distance / 8) / math.log(128 / 8) * 8))
    return distance + (16 if offset > 0 else 0)


def reference(tensors: dict[str, Tensor], ids: list[int], heads: int) -> Tensor:
    """The encoder for one prompt without padding, in float64: no score scaling, a position table a layer."""
    get = {name: value.double() for name, value in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * get[f"{name}.weight"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = get["token_embedding.weight"][ids]
    buckets = torch.tensor([[bucket(key - query) for key in range(len(ids))] for query in range(len(ids))])
    for layer in range(2):
        at = f"blocks.{layer}"
        y = norm(x, f"{at}.norm1")
        q, k, v = ((y @ get[f"{at}.attn.{n}.weight"].T).view(len(ids), heads, -1).transpose(0, 1) for n in "qkv")
        bias = get[f"{at}.pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        mixed = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ get[f"{at}.attn.o.weight"].T
        y = norm(x, f"{at}.norm2")
        gated = gelu(y @ get[f"{at}.ffn.gate.0.weight"].T) * (y @ get[f"{at}.ffn.fc1.weight"].T)
        x = x + gated @ get[f"{at}.ffn.fc2.weight"].T
    return norm(x, "norm")


def test_cleaning() -> None:
    assert clean_prompt("  a\t b\n\n c  ") == "a b c"
    assert clean_prompt("&amp;lt;b&amp;gt; &quot;x&quot;") == '<b> "x"'
    assert clean_prompt("schÃ¶n") == "schön"
    assert clean_prompt("一只猫") == "一只猫"


def test_tokens(tmp_path: Path) -> None:
    tiny_wan.write_tokenizer(tmp_path)
    ids, mask = load_tokenizer(tmp_path)(["the digit", "a"])
    assert ids.shape == mask.shape == (2, 512)
    assert ids[0, :4].tolist() == [3, 4, 1, 0]
    assert mask.sum(1).tolist() == [3, 2]
    ids, mask = load_tokenizer(tmp_path, text_len=4)(["a b a b a b", ""], padded=False)
    assert ids.tolist() == [[10, 11, 10, 1], [1, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("content", [None, "{"])
def test_bad_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers reads"):
        load_tokenizer(tmp_path)


def test_encoder_against_the_written_out_formula(tmp_path: Path) -> None:
    tensors = tiny_wan.t5_tensors()
    torch.save(tensors, tmp_path / "t5.pth")
    encoder = load_text_encoder(tmp_path / "t5.pth", dtype=torch.float32)
    assert encoder.dim == 16
    generator = torch.Generator().manual_seed(7)
    lengths = [150, 1, 30]
    ids = torch.randint(2, len(tiny_wan.WORDS), (3, 150), generator=generator)
    mask = (torch.arange(150) < torch.tensor(lengths)[:, None]).long()
    embeddings = encoder(ids * mask, mask)
    for row, length in enumerate(lengths):
        expected = reference(tensors, ids[row, :length].tolist(), heads=4)
        assert (embeddings[row, :length] - expected).abs().max() <= 5e-6
        assert not embeddings[row, length:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_against_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    peer = tiny_wan.umt5().to(dtype).requires_grad_(False)  # gradients would choose another kernel
    peer.save_pretrained(tmp_path / "text_encoder")
    ids, mask = torch.tensor([[3, 4, 8, 1], [10, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = peer(ids, attention_mask=mask).last_hidden_state * mask[..., None]
    loaded = load_text_encoder(tmp_path / "text_encoder", dtype=dtype)
    assert (loaded(ids, mask) - expected).abs().max() <= 5e-6
    assert loaded.model.encoder.embed_tokens.weight is loaded.model.shared.weight


@pytest.mark.parametrize("both", [True, False])
def test_the_second_name_of_the_token_embedding(tmp_path: Path, both: bool) -> None:
    peer = tiny_wan.umt5()
    peer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["shared.weight"] if both else tensors.pop("shared.weight")
    save_file(tensors | {"encoder.embed_tokens.weight": table.clone()}, tmp_path / "model.safetensors")
    loaded = load_text_encoder(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.model.shared.weight, table)


def test_prompts(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    encoder = load_prompt_encoder(path, dtype=torch.float32)
    embeddings, lengths = encoder.encode_prompts(PROMPTS)
    assert embeddings.shape == (3, 9, 16)
    assert lengths.tolist() == [6, 2, 9]
    tensors = torch.load(path / tiny_wan.T5, weights_only=True)
    expected = reference(tensors, [3, 4, 9, 5, 7, 1], heads=4)
    assert (embeddings[0, :6] - expected).abs().max() <= 5e-6
    assert not embeddings[1, 2:].any()
    alone, _ = encoder.encode_prompts(PROMPTS[1:2])  # does not depend on its neighbours, to the last bit
    assert torch.equal(alone[0], embeddings[1, :2])


def test_cache(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    first, lengths = load_prompt_encoder(path, cache_dir=tmp_path / "cache").encode_prompts(PROMPTS)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 3
    filled = load_prompt_encoder(path, cache_dir=tmp_path / "cache")
    filled._encoder = lambda: pytest.fail("the encoder was loaded, though all is in the cache")
    again, again_lengths = filled.encode_prompts(["  the digit 7\nmoves up", *PROMPTS[1:]])  # cleaning comes first
    assert torch.equal(first, again)
    assert torch.equal(lengths, again_lengths)
    files[0].write_bytes(files[0].read_bytes()[:50])
    files[1].write_bytes(b"")
    save_file({"other": torch.ones(1)}, files[2])
    repaired, _ = load_prompt_encoder(path, cache_dir=tmp_path / "cache").encode_prompts(PROMPTS)
    assert torch.equal(first, repaired)
    assert sorted(len(load_file(file)["embedding"]) for file in files) == [2, 6, 9]
    assert sorted((tmp_path / "cache").iterdir()) == files


def test_cache_knows_encoders_apart(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    keys = set()
    for dtype in (torch.float32, torch.bfloat16):
        for text_len in (512, 8):
            encoder = load_prompt_encoder(path, dtype=dtype, text_len=text_len, cache_dir=tmp_path / "cache")
            assert encoder.cache is not None
            keys.add(encoder.cache.path("a"))
    assert len(keys) == 4


def test_fingerprint(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "original")
    before = encoder_fingerprint(path)
    convert(path, tmp_path / "diffusers", to="diffusers", shard_size=2000)
    assert encoder_fingerprint(tmp_path / "diffusers") == before  # neither names nor shards matter
    tensors = torch.load(path / tiny_wan.T5, weights_only=True)
    for change in ({"norm.weight": tensors["norm.weight"] + 1}, {"norm.weight": tensors["norm.weight"].float()}):
        torch.save(tensors | change, path / tiny_wan.T5)
        assert encoder_fingerprint(path) != before
