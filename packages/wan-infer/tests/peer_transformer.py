"""diffusers' Wan transformers with the weights of ours, and with the original's sinusoid in float64."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

from wan_infer.checkpoints.names import TRANSFORMER
from wan_infer.config import TransformerConfig
from wan_infer.transformer import WanTransformer


class ExactTimesteps(nn.Module):
    """The sinusoid of the timestep as the original has it, stated independently of ours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.width // 2
        exponents = torch.linspace(0, -1 + 1 / half, half, dtype=torch.float64)
        angles = timestep.double()[:, None] * torch.pow(torch.tensor(10000.0, dtype=torch.float64), exponents)[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).float()


def empty_peer(config: TransformerConfig) -> nn.Module:
    """diffusers' model of this shape, as it initialises it."""
    shape: dict[str, Any] = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "pos_embed_seq_len": config.image_tokens,
    }
    if config.model_type == "vace":
        shape |= {"vace_layers": list(config.vace_layers), "vace_in_channels": config.vace_in_dim}
    peer: nn.Module = (WanVACETransformer3DModel if config.model_type == "vace" else WanTransformer3DModel)(**shape)
    return peer


def peer_of(model: WanTransformer, *, exact_timesteps: bool = True) -> nn.Module:
    """diffusers' model of the same shape that holds the same tensors."""
    peer = empty_peer(model.config)
    peer.load_state_dict({TRANSFORMER.to_diffusers(name)[0]: tensor for name, tensor in model.state_dict().items()})
    if exact_timesteps:
        peer.get_submodule("condition_embedder").timesteps_proj = ExactTimesteps(model.config.freq_dim)
    return peer.eval()
