"""The image tower of CLIP ViT-H/14: images to the tokens that condition i2v and flf2v."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_infer.errors import RequestError

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

# Of the channels red, green and blue, as published with CLIP (arXiv 2103.00020).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder(nn.Module):
    """Images to the hidden states before the last layer, which is never computed.

    Args:
        model: the tower of transformers. Its last layer is taken away.
    """

    def __init__(self, model: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.tower = model.vision_model
        self.tower.encoder.layers = self.tower.encoder.layers[:-1]
        self.image_size = int(model.config.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens [N, 1 + patches, C] in the dtype of the parameters; 257 tokens of 1280 for ViT-H/14.

        Args:
            images: [N, 3, H, W] in [-1, 1], any size. Aspect is not kept, as in the original.

        Raises:
            RequestError: the images have another shape.
        """
        weight = self.tower.pre_layrnorm.weight
        pixels = preprocess(images.to(weight.device), self.image_size).to(weight.dtype)
        tokens: Tensor = self.tower(pixel_values=pixels).last_hidden_state
        return tokens


def preprocess(images: Tensor, size: int) -> Tensor:
    """Resize bicubically, without antialiasing, to a square and normalise; float32 [N, 3, size, size].

    Raises:
        RequestError: the images are not [N, 3, H, W].
    """
    if images.ndim != 4 or images.shape[1] != len(MEAN):
        raise RequestError(f"images have the shape {list(images.shape)}; [N, 3, H, W] is expected")
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (resized * 0.5 + 0.5 - mean) / std
