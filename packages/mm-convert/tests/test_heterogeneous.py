"""A vision part that is cut less finely than the language model, or repeated along the pipeline; and its ends apart.

Expected files are those of plain layouts, put together by the published rules: rank t holds vision slice t % vit_tp,
rank p holds vision stage p % len(vit).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recorded_models import Recorded
from tiny_checkpoint import Tensors

from mm_convert import Converter, Layout, LayoutError, MegatronFolder, verify

QWEN = Converter.named("Qwen2_5_VLConverter")


def hf_of(directory: Path) -> Path:
    return Recorded.named("qwen2_5_vl").write(directory)


def rank(directory: Path, name: str, section: str = "model") -> Tensors:
    file = torch.load(directory / "release" / name / "model_optim_rng.pt", weights_only=True)
    return file[section]  # type: ignore[no-any-return]


def part(tensors: Tensors, prefix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def check_there_and_back(hf: Path, layout: Layout, tmp_path: Path) -> None:
    """Found on disk again, back to the same bytes, and to another layout and from it."""
    assert MegatronFolder.open(tmp_path / "mm").layout == layout
    QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    for path in hf.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    plain = Layout(llm_pp_layers=((1, 1, 3),), vit_pp_layers=((2, 1, 0),))
    QWEN.resplit(tmp_path / "mm", tmp_path / "plain", plain, hf_dir=hf)
    QWEN.resplit(tmp_path / "plain", tmp_path / "again", layout, hf_dir=hf)
    assert verify(tmp_path / "mm", tmp_path / "plain", full=True).same
    for file in (tmp_path / "mm/release").glob("*/*.pt"):
        assert (tmp_path / "again" / file.relative_to(tmp_path / "mm")).read_bytes() == file.read_bytes()


def test_a_whole_vision_part_on_every_tensor_parallel_rank(tmp_path: Path) -> None:
    hf = hf_of(tmp_path / "hf")
    lists = {"llm_pp_layers": ((2, 3),), "vit_pp_layers": ((3, 0),)}
    QWEN.hf_to_mm(hf, tmp_path / "fine", Layout(**lists, tp_size=4))  # type: ignore[arg-type]
    for vit_tp in (1, 2):
        target = tmp_path / f"to{vit_tp}"
        layout = Layout(**lists, tp_size=4, vit_tp_size=vit_tp)  # type: ignore[arg-type]
        QWEN.hf_to_mm(hf, target / "mm", layout)
        QWEN.hf_to_mm(hf, target / "coarse", Layout(**lists, tp_size=vit_tp))  # type: ignore[arg-type]
        for t in range(4):
            for p in range(2):
                made = rank(target / "mm", f"mp_rank_{t:02d}_{p:03d}")
                vision = rank(target / "coarse", f"mp_rank_{t % vit_tp:02d}_{p:03d}")
                language = rank(tmp_path / "fine", f"mp_rank_{t:02d}_{p:03d}")
                assert same(part(made, "image_encoder"), part(vision, "image_encoder"))
                assert same(part(made, "text_decoder"), part(language, "text_decoder"))
        check_there_and_back(hf, layout, target)


@pytest.mark.parametrize(
    ("llm", "vit"), [((2, 3), (3,)), ((1, 1, 2, 1), (2, 1)), ((1, 1, 3), (2, 1)), ((2, 2, 1), (3,))]
)
def test_a_vision_part_repeated_along_the_pipeline(llm: tuple[int, ...], vit: tuple[int, ...], tmp_path: Path) -> None:
    hf = hf_of(tmp_path / "hf")
    layout = Layout(llm_pp_layers=(llm,), vit_pp_layers=(vit,), tp_size=2)
    QWEN.hf_to_mm(hf, tmp_path / "mm", layout)
    zeros = (0,) * (len(llm) - len(vit))
    QWEN.hf_to_mm(hf, tmp_path / "once", Layout(llm_pp_layers=(llm,), vit_pp_layers=((*vit, *zeros),), tp_size=2))
    for t in range(2):
        for p in range(len(llm)):
            made = rank(tmp_path / "mm", f"mp_rank_{t:02d}_{p:03d}")
            vision = rank(tmp_path / "once", f"mp_rank_{t:02d}_{p % len(vit):03d}")
            language = rank(tmp_path / "once", f"mp_rank_{t:02d}_{p:03d}")
            assert same(part(made, "image_encoder"), part(vision, "image_encoder"))
            assert same(part(made, "text_decoder"), part(language, "text_decoder"))
    check_there_and_back(hf, layout, tmp_path)


def test_a_copy_that_was_changed_is_found_on_the_way_back(tmp_path: Path) -> None:
    hf = hf_of(tmp_path / "hf")
    QWEN.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3,),)))
    file = tmp_path / "mm/release/mp_rank_00_001/model_optim_rng.pt"
    content = torch.load(file, weights_only=True)
    content["model"]["image_encoder.encoder.blocks.layers.1.mlp.linear_fc2.weight"][0, 0] += 1
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"blocks\.layers\.1\.mlp\.linear_fc2\.weight .* must equal"):
        QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")


def test_ends_of_the_language_model_on_the_first_rank(tmp_path: Path) -> None:
    """LDT: the embedding on rank 0 of the first virtual stage with language layers, the output on that of the last."""
    hf = hf_of(tmp_path / "hf")
    llm, vit = ((0, 0, 0), (0, 2, 3), (0, 0, 0)), ((1, 1, 0), (1, 0, 0), (0, 0, 0))
    layout = Layout(llm_pp_layers=llm, vit_pp_layers=vit, ldt=True)
    QWEN.hf_to_mm(hf, tmp_path / "mm", layout)
    places = {
        name: (p, v)
        for p in range(3)
        for v in range(3)
        for name in rank(tmp_path / "mm", f"mp_rank_00_{p:03d}", f"model{v}")
    }
    assert places["text_decoder.embedding.word_embeddings.weight"] == (0, 1)
    assert places["text_decoder.decoder.final_layernorm.weight"] == (0, 2)
    assert places["text_decoder.output_layer.weight"] == (0, 2)
    assert places["image_encoder.encoder.patch_embed.proj.weight"] == (0, 0)
    assert places["image_encoder.projector.layernorm.weight"] == (0, 1)
    check_there_and_back(hf, layout, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vit_tp_size": 3}, r"vit_tp_size is 3; it must divide tp_size 2: one of \[1, 2\], or 0"),
        ({"audio_tp_size": -1}, "audio_tp_size is -1"),
        ({"ep_size": 0}, "ep_size is 0; it must be 1 or more"),
        ({"vit_pp_layers": ((1, 1, 1),)}, "different shapes"),
        ({"llm_pp_layers": ((1, 1), (1, 2)), "vit_pp_layers": ((3,), (0,))}, "without virtual stages"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, object], words: str) -> None:
    given: dict[str, object] = {"llm_pp_layers": ((2, 3),), "vit_pp_layers": ((3, 0),), "tp_size": 2}
    with pytest.raises(LayoutError, match=words):
        Layout(**{**given, **change})  # type: ignore[arg-type]
