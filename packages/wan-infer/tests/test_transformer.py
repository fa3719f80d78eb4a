"""The transformer beside diffusers' with the same random weights, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from peer_transformer import peer_of
from torch import Tensor, nn

from wan_infer.config import TRANSFORMERS, TransformerConfig
from wan_infer.errors import RequestError
from wan_infer.ops import attention
from wan_infer.transformer import WanTransformer, patchify, timestep_sinusoid, unpatchify

# Independent float32 implementations of this depth agree to about 1e-6 of outputs of a few units.
TOLERANCE = 2e-5

T2V = TransformerConfig(dim=96, ffn_dim=160, num_heads=12, num_layers=3, text_dim=40, text_len=512, freq_dim=32)
WIDE = replace(T2V, dim=256, num_heads=2, num_layers=2)  # heads of 128 channels, as published
I2V = replace(T2V, model_type="i2v", in_dim=36, image_dim=24)
FLF2V = replace(I2V, model_type="flf2v", image_tokens=514)
VACE = replace(T2V, model_type="vace", num_layers=4, vace_layers=(0, 2))


def random_model(config: TransformerConfig, seed: int = 0) -> WanTransformer:
    """A model whose every tensor matters: no zeros, no ones, outputs of a few units."""
    torch.manual_seed(seed)
    model = WanTransformer(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "modulation" not in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.5)
    return model


def inputs(config: TransformerConfig, grid: tuple[int, int, int], batch: int, rows: int = 23) -> dict[str, Tensor]:
    size = (grid[0], 2 * grid[1], 2 * grid[2])
    given = {
        "latents": torch.randn(batch, 16, *size),
        "timestep": torch.tensor([999.0, 500.0, 3.0][:batch]),
        "text": torch.randn(batch, rows, config.text_dim),
    }
    if config.image_dim:
        given["clip"] = torch.randn(batch, config.image_tokens or 257, config.image_dim)
        given["condition"] = torch.randn(batch, 20, *size)
    if config.vace_layers:
        given["condition"] = torch.randn(batch, 96, *size)
    return given


def peer_output(peer: nn.Module, config: TransformerConfig, given: dict[str, Tensor]) -> Tensor:
    text = nn.functional.pad(given["text"], (0, 0, 0, config.text_len - given["text"].shape[1]))
    arguments = {"timestep": given["timestep"], "encoder_hidden_states": text, "return_dict": False}
    latents = given["latents"]
    if config.image_dim:
        latents = torch.cat([latents, given["condition"]], dim=1)
        clip = given["clip"]  # flf2v: diffusers takes the two images one below the other in the batch
        arguments["encoder_hidden_states_image"] = clip.reshape(-1, 257, clip.shape[2])
    if config.vace_layers:
        arguments["control_hidden_states"] = given["condition"]
        arguments["control_hidden_states_scale"] = torch.ones(len(config.vace_layers))
    output: Tensor = peer(latents, **arguments)[0]
    return output


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 5, 7), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("config", [T2V, WIDE, I2V, FLF2V, VACE], ids=["t2v", "wide", "i2v", "flf2v", "vace"])
def test_the_velocity_is_that_of_diffusers(config: TransformerConfig, grid: tuple[int, int, int]) -> None:
    model = random_model(config)
    peer = peer_of(model)
    given = inputs(config, grid, batch=2)
    with torch.inference_mode():
        ours, theirs = model(**given), peer_output(peer, config, given)
    assert ours.shape == theirs.shape
    assert 1 < theirs.abs().max() < 50
    assert (ours - theirs).abs().max() <= TOLERANCE


def test_stock_diffusers_differs_only_by_the_precision_of_its_sinusoid() -> None:
    model = random_model(T2V)
    given = inputs(T2V, (2, 3, 3), batch=1)
    with torch.inference_mode():
        ours = model(**given)
        stock = peer_output(peer_of(model, exact_timesteps=False), T2V, given)
    assert (ours - stock).abs().max() <= 2e-4  # float32 angles near 1000 are off by up to 6e-5


@pytest.mark.parametrize("rows", [1, 7, 8, 496, 505, 511, 512])
def test_padding_of_the_text_counts_as_the_original_counts_it(rows: int) -> None:
    """One zero row with its weight must do what all the zero rows do, for every length of the text."""
    model = random_model(T2V)
    peer = peer_of(model)
    given = inputs(T2V, (1, 2, 3), batch=1, rows=rows)
    with torch.inference_mode():
        assert (model(**given) - peer_output(peer, T2V, given)).abs().max() <= TOLERANCE


def test_prompts_of_different_lengths_share_a_batch() -> None:
    model = random_model(T2V)
    given = inputs(T2V, (2, 3, 3), batch=3)
    lengths = torch.tensor([23, 1, 9])
    with torch.inference_mode():
        together = model(**given, text_lengths=lengths)
        for index, length in enumerate(lengths.tolist()):
            alone = {name: tensor[index : index + 1] for name, tensor in given.items()}
            alone["text"] = alone["text"][:, :length]
            assert (together[index] - model(**alone)[0]).abs().max() <= TOLERANCE


def test_a_prepared_prompt_gives_the_same_bits() -> None:
    for config in (T2V, FLF2V, VACE):
        model = random_model(config)
        given = inputs(config, (2, 3, 3), batch=2)
        with torch.inference_mode():
            direct = model(**given)
            context = model.prepare_text(given.pop("text"), clip=given.pop("clip", None))
            assert torch.equal(direct, model(text=context, **given))


@pytest.mark.parametrize("size", [(1, 3, 5), (2, 7, 4), (3, 1, 1)], ids=str)
def test_odd_latents_are_completed_and_cut_off_again(size: tuple[int, int, int]) -> None:
    model = random_model(T2V)
    given = inputs(T2V, (1, 1, 1), batch=1)
    given["latents"] = torch.randn(1, 16, *size)
    padded = nn.functional.pad(given["latents"], (0, size[2] % 2, 0, size[1] % 2))
    with torch.inference_mode():
        ours, whole = model(**given), model(**{**given, "latents": padded})
    assert ours.shape == (1, 16, *size)
    assert torch.equal(ours, whole[..., : size[1], : size[2]])


def test_bfloat16_keeps_its_islands_and_stays_near() -> None:
    model = random_model(WIDE)
    given = inputs(WIDE, (2, 4, 3), batch=1)
    with torch.inference_mode():
        exact = model(**given)
        for name, parameter in model.named_parameters():
            if not WanTransformer.keeps_float32(name):
                parameter.data = parameter.data.bfloat16()
        low = model(**given)
    islands = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert {"blocks.0.modulation", "blocks.0.norm3.weight", "blocks.1.self_attn.norm_q.weight"} <= islands
    assert {"time_embedding.0.weight", "time_projection.1.bias", "head.modulation"} <= islands
    assert not any(".ffn." in name or ".self_attn.q." in name or "text_embedding" in name for name in islands)
    assert low.dtype == torch.float32
    # Two blocks of seven bfloat16 products each, 2^-9 apiece, relative to the size of the output.
    assert (low - exact).std() <= 2**-9 * 14 * exact.std()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("t2v-1.3B", 1_418_996_800), ("t2v-14B", 14_288_491_584)],
)
def test_the_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = WanTransformer(TRANSFORMERS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_training_reaches_every_parameter() -> None:
    model = random_model(FLF2V)
    model(**inputs(FLF2V, (1, 2, 2), batch=1)).square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_attention_is_softmax_of_scores_with_bias() -> None:
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    bias = torch.randn(7)
    scores = torch.einsum("bsnd,btnd->bnst", q.double(), k.double()) / 8**0.5 + bias.double()
    expected = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v.double())
    assert (attention(q, k, v, key_bias_T=bias) - expected).abs().max() < 1e-6


def test_patches_are_put_together_again() -> None:
    latents = torch.randn(2, 3, 2, 5, 4)
    patches, grid = patchify(latents, (1, 2, 2))
    assert patches.shape == (2, 12, 12)
    assert grid == (2, 3, 2)
    channels_last = patches.reshape(2, 12, 3, 4).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(channels_last, grid, (1, 2, 2), latents.shape[2:]), latents)


def test_the_sinusoid_is_exact_at_large_timesteps() -> None:
    import math

    sinusoid = timestep_sinusoid(torch.tensor([999.0]), 8)[0].tolist()
    angles = [999 * 10000 ** (-i / 4) for i in range(4)]
    assert sinusoid == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-7)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (T2V, {"latents": torch.zeros(16, 1, 2, 2)}, r"\[B, C, T, H, W\] is expected"),
        (T2V, {"latents": torch.zeros(1, 15, 1, 2, 2)}, "latents of 15 and a condition of 0 channels"),
        (T2V, {"timestep": torch.zeros(2)}, r"timestep has the shape \[2\]; \[1\]"),
        (T2V, {"text": torch.zeros(1, 513, 40)}, "up to 512, 40"),
        (T2V, {"text": torch.zeros(1, 5, 41)}, "up to 512, 40"),
        (T2V, {"clip": torch.zeros(1, 257, 24)}, "takes no clip tokens"),
        (T2V, {"condition": torch.zeros(1, 20, 1, 2, 2)}, "a condition of 20 channels"),
        (I2V, {"clip": None}, r"takes clip tokens \[B, tokens, 24\]"),
        (I2V, {"condition": None}, "takes 36 input channels and a condition of 20"),
        (I2V, {"condition": torch.zeros(1, 20, 1, 2, 4)}, "batch, frames, rows and columns"),
        (VACE, {"condition": None}, "a condition of 96"),
        (VACE, {"latents": torch.zeros(1, 8, 1, 2, 2)}, "latents have 8 channels"),
    ],
)
def test_what_does_not_fit_is_refused(config: TransformerConfig, change: dict[str, Tensor], message: str) -> None:
    given = {**inputs(config, (1, 1, 1), batch=1), **change}
    with pytest.raises(RequestError, match=message):
        WanTransformer(config)(**given)
