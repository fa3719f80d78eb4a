"""The image tower against transformers and against the plain statement of the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_wan
import torch
import torch.nn.functional as F
from torch import Tensor

from wan_infer.checkpoints.loading import load_clip
from wan_infer.clip import MEAN, STD, preprocess
from wan_infer.errors import RequestError


def reference(tensors: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """Vision transformer with norms in front (arXiv 2010.11929), without the last layer."""
    get = {name.removeprefix("visual."): value.float() for name, value in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get[f"{name}.weight"], get[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, get[f"{name}.weight"], get[f"{name}.bias"])

    patches = F.conv2d(pixels, get["patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([get["cls_embedding"].expand(len(patches), -1, -1), patches], 1) + get["pos_embedding"]
    x = norm(x, "pre_norm")
    for layer in range(2):
        name = f"transformer.{layer}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.to_qkv").chunk(3, -1)
        q, k, v = (part.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((scores @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.0")), f"{name}.mlp.2")
    return x


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 31, 45, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_original_layout(tmp_path: Path, images: Tensor) -> None:
    tensors = tiny_wan.clip_tensors()
    torch.save(tensors, tmp_path / "clip.pth")
    tokens = load_clip(tmp_path / "clip.pth")(images)
    expected = reference(tensors, preprocess(images, 28), heads=2)
    assert tokens.shape == (2, 5, 160)
    assert (tokens - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("projected", [True, False])
def test_diffusers_layout(tmp_path: Path, images: Tensor, projected: bool) -> None:
    peer = tiny_wan.clip()
    (peer if projected else peer.vision_model).save_pretrained(tmp_path / "image_encoder")
    expected = peer(preprocess(images, 28), output_hidden_states=True).hidden_states[-2]
    assert (load_clip(tmp_path / "image_encoder")(images) - expected).abs().max() <= 1e-5


def test_bfloat16(tmp_path: Path, images: Tensor) -> None:
    torch.save(tiny_wan.clip_tensors(), tmp_path / "clip.pth")
    tokens = load_clip(tmp_path / "clip.pth", dtype=torch.bfloat16)(images)
    assert tokens.dtype == torch.bfloat16
    exact = load_clip(tmp_path / "clip.pth")(images)
    assert F.cosine_similarity(tokens.float().flatten(), exact.flatten(), dim=0) > 0.999


def test_preprocessing() -> None:
    image = torch.empty(1, 3, 28, 28).uniform_(-1, 1)
    for channel in range(3):  # of the wanted size already: only normalised
        expected = ((image[0, channel] + 1) / 2 - MEAN[channel]) / STD[channel]
        assert torch.allclose(preprocess(image, 28)[0, channel], expected, atol=1e-6)
    flat = torch.full((1, 3, 50, 20), 0.25)
    assert preprocess(flat, 28)[0, 1].allclose(torch.tensor((0.625 - MEAN[1]) / STD[1]), atol=1e-5)
    with pytest.raises(RequestError, match=r"\[1, 4, 2, 2\]; \[N, 3, H, W\] is expected"):
        preprocess(torch.ones(1, 4, 2, 2), 28)
