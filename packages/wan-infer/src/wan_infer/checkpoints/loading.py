"""Opening checkpoints, and loading each part of one by itself.

Both layouts are read: the original one and that of diffusers. Every loader takes the folder of a checkpoint, or the own
file or folder of its part::

    transformer = load_transformer("Wan2.1-T2V-1.3B", device="npu")
    vae = load_vae("Wan2.1-T2V-1.3B/Wan2.1_VAE.pth")

Values come by memory map, a tensor at a time, and are cast on arrival; there is never a second copy of a model in
memory. On the CPU, a tensor that has the wanted dtype already is used where it lies in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from wan_infer.checkpoints.layout import PLACES, Part, Source, find, layout_of
from wan_infer.checkpoints.metadata import Stored, transformer_config
from wan_infer.checkpoints.names import UMT5, Layout
from wan_infer.checkpoints.parts import open_part
from wan_infer.checkpoints.tensors import Tensors, fingerprint, translate
from wan_infer.clip import ClipEncoder
from wan_infer.config import ModelType, TransformerConfig
from wan_infer.errors import CheckpointError, RequestError
from wan_infer.text import TEXT_LEN, PromptEncoder, TextEncoder, load_tokenizer, tokenizer_fingerprint
from wan_infer.text_cache import EmbeddingCache
from wan_infer.transformer import WanTransformer
from wan_infer.vae import WanVae

Device = torch.device | str | None
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        path: the folder.
        layout: "original" or "diffusers".
    """

    path: Path
    layout: Layout

    @cached_property
    def config(self) -> TransformerConfig:
        """The shape of its transformer.

        Raises:
            CheckpointError: the transformer is incomplete, or its configuration is of another model.
        """
        source = find(self.path, "transformer")
        tensors = source.tensors()
        return transformer_config(Stored(tensors.place, self.layout, source.config(), tensors.meta))

    @property
    def model_type(self) -> ModelType:
        """What the transformer is conditioned on besides text."""
        return self.config.model_type

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that this model needs."""
        parts: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "tokenizer")
        return parts if self.config.image_dim is None else (*parts, "clip")

    def source(self, part: Part) -> Source:
        """Return where a part is, or would be."""
        return Source(part=part, layout=self.layout, path=self.path / PLACES[self.layout][part])

    def missing(self, parts: Iterable[Part]) -> list[str]:
        """Return the files of these parts that are not there, relative to the folder."""
        files = ((path, part) for part in parts for path in self.source(part).missing())
        return [f"{path.relative_to(self.path)} ({part})" for path, part in files]


def open_checkpoint(path: str | Path, *, parts: Iterable[Part] | None = None) -> Checkpoint:
    """Open a checkpoint folder of either layout; only headers are read.

    Args:
        path: the folder.
        parts: what has to be there; None means everything that the model needs.

    Raises:
        CheckpointError: it is no checkpoint, or incomplete; names every file that is missing.
    """
    checkpoint = Checkpoint(Path(path), layout_of(Path(path)))
    wanted = ("transformer", "vae", "text_encoder", "tokenizer") if parts is None else tuple(parts)
    missing = checkpoint.missing(wanted)
    if parts is None and not checkpoint.missing(["transformer"]):
        missing = checkpoint.missing(checkpoint.parts)
    if missing:
        raise CheckpointError(
            f"{path} is an incomplete checkpoint ({checkpoint.layout} layout); copy the whole of it. "
            f"Missing: {', '.join(missing)}"
        )
    return checkpoint


def load_transformer(path: str | Path, *, device: Device = None, dtype: torch.dtype = torch.bfloat16) -> WanTransformer:
    """Load the transformer; what has to stay in float32 does (`WanTransformer.keeps_float32`).

    Args:
        path: a checkpoint, or the folder of a transformer in the diffusers layout.
        device: where the model goes, the CPU by default.
        dtype: of the other parameters.

    Raises:
        CheckpointError: files or tensors are missing, unexpected, damaged or of another shape; names all of them.
    """
    module, tensors = _open(find(path, "transformer"), WanTransformer)
    _fill(module, tensors.read, device, dtype, keeps_float32=WanTransformer.keeps_float32)
    return module


def load_vae(path: str | Path, *, device: Device = None, dtype: torch.dtype = torch.float32) -> WanVae:
    """Load the VAE; `path` may also be ``Wan2.1_VAE.pth`` or a ``vae`` folder. Otherwise as `load_transformer`."""
    module, tensors = _open(find(path, "vae"), WanVae)
    _fill(module, tensors.read, device, dtype)
    return module


def load_text_encoder(path: str | Path, *, device: Device = None, dtype: torch.dtype = torch.bfloat16) -> TextEncoder:
    """Load the text encoder; `path` may also be its ``.pth`` file or ``text_encoder`` folder.

    Raises:
        RequestError: `dtype` is float16, in which this encoder overflows.
        CheckpointError: as for `load_transformer`.
    """
    from transformers import UMT5EncoderModel

    if dtype == torch.float16:
        raise RequestError("the text encoder overflows in float16; use bfloat16 or float32")
    model, tensors = _open(find(path, "text_encoder"), UMT5EncoderModel)
    model.set_input_embeddings(model.shared)  # one table in both places
    _fill(model, tensors.read, device, dtype)
    return TextEncoder(model)


def load_clip(path: str | Path, *, device: Device = None, dtype: torch.dtype = torch.float32) -> ClipEncoder:
    """Load the image tower of CLIP; `path` may also be its ``.pth`` file or ``image_encoder`` folder.

    Raises:
        CheckpointError: as for `load_transformer`.
    """
    from transformers import CLIPVisionModelWithProjection

    module, tensors = _open(find(path, "clip"), CLIPVisionModelWithProjection)
    encoder = ClipEncoder(module)
    _fill(encoder.tower, lambda name: tensors.read(f"vision_model.{name}"), device, dtype)
    embeddings = encoder.tower.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device).expand(1, -1)
    return encoder


def load_prompt_encoder(
    path: str | Path,
    *,
    device: Device = None,
    dtype: torch.dtype = torch.bfloat16,
    text_len: int = TEXT_LEN,
    cache_dir: str | Path | None = None,
) -> PromptEncoder:
    """Return what turns prompts into embeddings. The text encoder is loaded when a prompt is not in the cache.

    Args:
        path: a checkpoint folder.
        device: where the encoder goes, the CPU by default.
        dtype: of its parameters.
        text_len: most tokens of a prompt.
        cache_dir: where embeddings are kept, if at all.

    Raises:
        CheckpointError: the tokenizer is missing, or with a cache, the text encoder.
    """
    folder = find(path, "tokenizer").path
    cache = None
    if cache_dir is not None:
        key = f"{encoder_fingerprint(path)} {tokenizer_fingerprint(folder)} {dtype} {text_len}"
        cache = EmbeddingCache(cache_dir, key)
    return PromptEncoder(
        lambda: load_tokenizer(folder, text_len=text_len),
        lambda: load_text_encoder(path, device=device, dtype=dtype),
        cache=cache,
    )


def encoder_fingerprint(path: str | Path) -> str:
    """Return `wan_infer.checkpoints.tensors.fingerprint` of the text encoder, the same for both layouts."""
    source = find(path, "text_encoder")
    tensors = source.tensors()
    return fingerprint(translate(tensors, UMT5, "diffusers") if source.layout == "original" else tensors)


def _open(source: Source, kind: type[M]) -> tuple[M, Tensors]:
    """Return the empty module of a part, and its tensors by the names of the module."""
    blank, tensors = open_part(source)
    assert isinstance(blank.module, kind), "a part has one class"
    same = source.layout == blank.layout
    return blank.module, tensors if same else translate(tensors, blank.names, blank.layout)


def _fill(
    module: nn.Module,
    read: Callable[[str], Tensor],
    device: Device,
    dtype: torch.dtype,
    *,
    keeps_float32: Callable[[str], bool] = lambda name: False,
) -> None:
    """Give every parameter its value, one after the other."""
    for name in [name for name, _ in module.named_parameters()]:
        value = read(name).to(device, torch.float32 if keeps_float32(name) else dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    module.eval()
