"""Rows that Megatron puts behind a vocabulary: a multiple of make_vocab_size_divisible_by times tp_size of them.

The rule is that of Megatron-LM's ``vocab_size_with_padding``: while the size is no multiple of the product of the two
numbers, one more; ranks hold equal parts.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory_plans import convert, same, slices
from recorded_models import Recorded
from test_every_model import MODELS, layouts
from test_resplit import weights
from test_torch_dist import contents, loaded, text_model
from tiny_checkpoint import HIDDEN, VOCAB, MakeModel, tensors
from torch import Tensor

from mm_convert import (
    CheckpointError,
    Converter,
    Layout,
    LayoutError,
    MegatronFolder,
    ModelSizes,
    Plan,
    assemble,
    forecast,
    inspect,
    verify,
)
from mm_convert.cli import main
from mm_convert.distributed.folder import DistributedFolder
from mm_convert.distributed.torch_dist import (
    prepare_hf_to_torch_dist,
    prepare_mm_to_torch_dist,
    prepare_torch_dist_to_hf,
    prepare_torch_dist_to_mm,
)
from mm_convert.resplit import compose
from mm_convert.rules import PADDING, Rule, Vocabulary

EMBEDDING, OUTPUT = "text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight"
VL, TEXT = Converter.named("Qwen2_5_VLConverter"), Converter.named("Qwen2_5Converter")
FOUR = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), tp_size=4, make_vocab_size_divisible_by=3)
PIPELINE = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2, make_vocab_size_divisible_by=9)
# Other multiples than powers of two, so that only who knows them takes the rows for padding: 36 at both layouts.
PADDED = 36


def megatrons_size(size: int, divisible_by: int, tp: int) -> int:
    while size % (divisible_by * tp):
        size += 1
    return size


def rows_of_rank(whole: Tensor, divisible_by: int, tp: int, rank: int) -> Tensor:
    padded = torch.zeros(megatrons_size(len(whole), divisible_by, tp), *whole.shape[1:], dtype=whole.dtype)
    padded[: len(whole)] = whole
    return padded.chunk(tp)[rank]


def rank_file(directory: Path, tp: int, pp: int | None = None) -> Path:
    stage = "" if pp is None else f"_{pp:03d}"
    return directory / "release" / f"mp_rank_{tp:02d}{stage}" / "model_optim_rng.pt"


def held(directory: Path, tp: int, pp: int | None = None) -> dict[str, Tensor]:
    return torch.load(rank_file(directory, tp, pp), weights_only=True)["model"]  # type: ignore[no-any-return]


def trained(directory: Path, source: Path) -> Path:
    """What a trainer saves of a folder: other bytes in the padded rows, and no manifest."""
    for path in sorted(source.glob("release/*/*.pt")):
        content = torch.load(path, weights_only=True)
        rank = int(path.parent.name.split("_")[2])
        for name, tensor in content["model"].items():
            if name in (EMBEDDING, OUTPUT):
                tensor[max(0, VOCAB - rank * len(tensor)) :] = 7.0
        (directory / path.relative_to(source)).parent.mkdir(parents=True)
        torch.save(content, directory / path.relative_to(source))
    (directory / "latest_checkpointed_iteration.txt").write_text("release")
    return directory


@pytest.mark.parametrize("tied", [False, True])
def test_every_rank_has_its_rows_and_zeros_behind_them(make_model: MakeModel, tmp_path: Path, tied: bool) -> None:
    hf, made = make_model(tied=tied), tensors(tied=tied)
    VL.hf_to_mm(hf, tmp_path / "four", FOUR)
    VL.hf_to_mm(hf, tmp_path / "pipeline", PIPELINE)
    embedding = made["model.embed_tokens.weight"]
    output = embedding if tied else made["lm_head.weight"]
    for t in range(4):
        found = held(tmp_path / "four", t)
        assert torch.equal(found[EMBEDDING], rows_of_rank(embedding, 3, 4, t))
        assert tied == (OUTPUT not in found)
        assert tied or torch.equal(found[OUTPUT], rows_of_rank(output, 3, 4, t))
    for t in range(2):
        assert torch.equal(held(tmp_path / "pipeline", t, 0)[EMBEDDING], rows_of_rank(embedding, 9, 2, t))
        assert torch.equal(held(tmp_path / "pipeline", t, 1)[OUTPUT], rows_of_rank(output, 9, 2, t))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", [FOUR, PIPELINE])
def test_there_and_back_are_the_same_bytes(make_model: MakeModel, tmp_path: Path, tied: bool, layout: Layout) -> None:
    hf = make_model(tied=tied)
    VL.hf_to_mm(hf, tmp_path / "mm", layout)
    VL.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert contents(tmp_path / "back", "*.safetensors") == contents(hf, "*.safetensors")
    options = json.loads((tmp_path / "mm/manifest.json").read_text())["options"]
    assert (options["vocab_size"], options["make_vocab_size_divisible_by"]) == (
        VOCAB,
        layout.make_vocab_size_divisible_by,
    )
    assert verify(hf, tmp_path / "mm", full=True).same
    assert inspect(tmp_path / "mm").layout == layout


def test_what_training_made_of_the_padding_is_left_out(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    VL.hf_to_mm(hf, tmp_path / "mm", PIPELINE)
    mm = trained(tmp_path / "trained", tmp_path / "mm")
    with pytest.raises(CheckpointError, match=r"36 rows .* 32 tokens.*make_vocab_size_divisible_by"):
        VL.mm_to_hf(mm, hf, tmp_path / "back")
    planned = VL.prepare_mm_to_hf(mm, hf, tmp_path / "back", layout=PIPELINE)
    assert planned.target.options["vocab_padding_dropped"] == 2 * (PADDED - VOCAB)
    planned.run()
    assert contents(tmp_path / "back", "*.safetensors") == contents(hf, "*.safetensors")


def test_megatrons_default_is_known_without_being_told(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model(tied=True)
    for multiple in (128, 16):
        made = tmp_path / f"mm{multiple}"
        VL.hf_to_mm(hf, made, replace(PIPELINE, tp_size=4, make_vocab_size_divisible_by=multiple))
        (made / "manifest.json").unlink()
        VL.mm_to_hf(made, hf, tmp_path / f"back{multiple}")
        assert contents(tmp_path / f"back{multiple}", "*.safetensors") == contents(hf, "*.safetensors")
        assert verify(made, hf).same
    assert verify(tmp_path / "mm128", tmp_path / "mm16", full=True).same


def test_added_tokens_are_not_taken_for_padding(make_model: MakeModel, tmp_path: Path) -> None:
    more = torch.randn(VOCAB + 12, HIDDEN)
    grown = make_model("grown", **{"model.embed_tokens.weight": more, "lm_head.weight": more.clone()})
    VL.hf_to_mm(grown, tmp_path / "mm", replace(PIPELINE, make_vocab_size_divisible_by=0))
    (tmp_path / "mm/manifest.json").unlink()
    hf = make_model()
    with pytest.raises(CheckpointError, match="if tokens were added"):
        VL.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert {difference.kind for difference in verify(tmp_path / "mm", hf).differences} >= {"shape"}
    wrong = replace(PIPELINE, make_vocab_size_divisible_by=5)
    with pytest.raises(LayoutError, match=r"given: make_vocab_size_divisible_by 5; but .* \[22, 22\]"):
        MegatronFolder.open(tmp_path / "mm", wrong)


def test_a_changed_token_is_found_and_changed_padding_is_none(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    VL.hf_to_mm(hf, tmp_path / "mm", replace(PIPELINE, make_vocab_size_divisible_by=16))
    VL.hf_to_mm(hf, tmp_path / "whole", replace(PIPELINE, tp_size=1, make_vocab_size_divisible_by=0))
    mm = trained(tmp_path / "trained", tmp_path / "mm")
    for other in (hf, tmp_path / "whole"):
        assert verify(mm, other, full=True).same
    shutil.copy(tmp_path / "mm/manifest.json", mm)
    assert verify(mm, tmp_path / "mm", full=True).same
    content = torch.load(rank_file(mm, 1, 0), weights_only=True)
    content["model"][EMBEDDING][3, 4] += 1
    torch.save(content, rank_file(mm, 1, 0))
    for other in (hf, tmp_path / "whole"):
        [difference] = verify(mm, other, full=True).differences
        assert (difference.kind, difference.elements) == ("bytes", 1)


@pytest.mark.parametrize("tied", [False, True])
def test_resplit_changes_the_padding_as_the_new_layout_asks(make_model: MakeModel, tmp_path: Path, tied: bool) -> None:
    hf = make_model(tied=tied)
    plain = replace(FOUR, make_vocab_size_divisible_by=0)
    for name, layout in {"four": FOUR, "pipeline": PIPELINE, "plain": plain}.items():
        VL.hf_to_mm(hf, tmp_path / name, layout)
    for source, target, layout in (
        ("four", "pipeline", PIPELINE),
        ("pipeline", "four", FOUR),
        ("pipeline", "plain", plain),
        ("plain", "pipeline", PIPELINE),
    ):
        made = tmp_path / f"{source}_{target}"
        VL.resplit(tmp_path / source, made, layout, hf_dir=hf)
        assert weights(made) == weights(tmp_path / target)
        assert verify(made, tmp_path / source, full=True).same


def test_a_trained_folder_needs_the_configuration_for_another_padding(tmp_path: Path) -> None:
    model = Recorded.named("qwen2")
    hf = model.write(tmp_path / "hf")
    one, two = (Layout(llm_pp_layers=((5,),), tp_size=t, make_vocab_size_divisible_by=16) for t in (4, 2))
    TEXT.hf_to_mm(hf, tmp_path / "mm", one)
    mm = trained(tmp_path / "trained", tmp_path / "mm")
    TEXT.hf_to_mm(hf, tmp_path / "expected", two)
    with pytest.raises(LayoutError, match=r"can't be told from the tensors; name a folder.*hf_config\.hf_dir"):
        TEXT.resplit(mm, tmp_path / "again", two)
    TEXT.resplit(mm, tmp_path / "again", two, hf_dir=hf)
    assert weights(tmp_path / "again") == weights(tmp_path / "expected")
    # Not asked for padding, and not told what it is: all rows stay.
    TEXT.resplit(mm, tmp_path / "kept", replace(two, make_vocab_size_divisible_by=0))
    assert len(held(tmp_path / "kept", 0)[EMBEDDING]) == 32
    TEXT.mm_to_hf(tmp_path / "kept", hf, tmp_path / "back")
    assert contents(tmp_path / "back", "*.safetensors") == contents(hf, "*.safetensors")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", [*MODELS, "internvl"])
def test_every_model_with_a_vocabulary(tmp_path: Path, model: str, tied: bool) -> None:
    found = Recorded.named(model)
    hf = (found.tied() if tied and model in MODELS else found).write(tmp_path / "hf")
    converter = Converter.named(MODELS.get(model, "InternVLConverter"))
    layout = (
        layouts(found)[0] if model in MODELS else Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2)
    )
    layout = replace(layout, make_vocab_size_divisible_by=5)
    converter.hf_to_mm(hf, tmp_path / "mm", layout)
    converter.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert contents(tmp_path / "back", "*.safetensors") == contents(hf, "*.safetensors")
    again = Layout.undivided(layout.layers, make_vocab_size_divisible_by=7)
    converter.resplit(tmp_path / "mm", tmp_path / "one", again)
    converter.hf_to_mm(hf, tmp_path / "expected", again)
    assert weights(tmp_path / "one") == weights(tmp_path / "expected")
    assert verify(hf, tmp_path / "one", full=True).same


@given(st.integers(1, 400), st.integers(1, 8), st.integers(1, 130))
@settings(max_examples=200, deadline=None)
def test_rows_of_any_vocabulary_by_megatrons_own_loop(size: int, tp: int, divisible_by: int) -> None:
    ranks = Vocabulary(divisible_by).pieces([(size, 2)], tp)
    padded = torch.cat([torch.arange(1, size + 1), torch.zeros(megatrons_size(size, divisible_by, tp) - size).long()])
    for rank, pieces in enumerate(ranks):
        rows = [
            torch.zeros(piece.stop - piece.start).long()
            if piece.source == PADDING
            else torch.arange(piece.start + 1, piece.stop + 1)
            for piece in pieces
        ]
        assert torch.equal(torch.cat(rows), padded.chunk(tp)[rank])


def _ends(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    """A model of nothing but a vocabulary."""
    return tuple(rule for rule in TEXT.family.rules(sizes, pp_size) if ".layers." not in rule.mm)


ENDS = replace(TEXT.family, rules=_ends)


@given(
    st.integers(1, 60),
    st.booleans(),
    st.tuples(st.sampled_from((1, 2, 4)), st.integers(0, 20), st.booleans()),
    st.tuples(st.sampled_from((1, 2, 4)), st.integers(0, 20), st.booleans()),
)
@settings(max_examples=150, deadline=None)
def test_any_padding_to_any_other(
    size: int, tied: bool, first: tuple[int, int, bool], second: tuple[int, int, bool]
) -> None:
    """Ranks by the formula, the way back, and from one layout to the other."""
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    held = {name: torch.randn(size, 2).bfloat16() for name in names} | {"model.norm.weight": torch.ones(2).bfloat16()}
    config = {"model_type": "qwen2", "num_hidden_layers": 2, "num_key_value_heads": 4, "tie_word_embeddings": tied}
    done = []
    for tp, by, pipeline in (first, second):
        lists = ((1, 1),) if pipeline else ((2,),)
        layout = Layout(llm_pp_layers=lists, tp_size=tp, make_vocab_size_divisible_by=by)
        if not by and size % tp:
            with pytest.raises(LayoutError, match="does not divide the vocabulary"):
                convert(ENDS, config, held, layout)
            return
        made = convert(ENDS, config, held, layout)
        for ref, tensor in made.made.items():
            source = {EMBEDDING: names[0], OUTPUT: names[-1]}.get(ref.name)
            rank = layout.ranks(ref).tp
            assert source is None or torch.equal(tensor, rows_of_rank(held[source], by or 1, tp, rank))
        assert same(made.back(), held)
        done.append(made)
    one, other = done
    plan = Plan.build(one.plan.targets, other.plan.targets, compose(one.segments, other.segments))
    assert all(torch.equal(assemble(plan, ref, lambda s: slices(one.made, s)), t) for ref, t in other.made.items())


def test_a_vocabulary_that_does_not_divide_names_the_option(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = torch.randn(VOCAB - 1, HIDDEN)
    hf = make_model(**{"model.embed_tokens.weight": odd, "lm_head.weight": odd.clone()})
    line = ["Qwen2_5_VLConverter", "hf_to_mm", "--cfg.mm_dir", str(tmp_path / "mm"), "--cfg.hf_config.hf_dir", str(hf),
            "--cfg.parallel_config.llm_pp_layers", "[5]", "--cfg.parallel_config.vit_pp_layers", "[3]",
            "--cfg.parallel_config.tp_size", "2"]  # fmt: skip
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "vocabulary of 31 tokens" in said
    assert "make_vocab_size_divisible_by 128" in said
    line += ["--cfg.parallel_config.make_vocab_size_divisible_by", "128"]
    assert main(["plan", *line]) == 0
    assert "make_vocab_size_divisible_by 128" in capsys.readouterr().out
    assert main(line) == 0
    assert held(tmp_path / "mm", 1)[EMBEDDING].eq(0).all()
    back = ["Qwen2_5_VLConverter", "mm_to_hf", "--cfg.mm_dir", str(tmp_path / "mm"), "--cfg.hf_config.hf_dir", str(hf),
            "--cfg.save_hf_dir", str(tmp_path / "back")]  # fmt: skip
    assert main(["plan", *back]) == 0
    assert "450 rows of padding left out" in capsys.readouterr().out
    assert main(back) == 0
    assert contents(tmp_path / "back", "*.safetensors") == contents(hf, "*.safetensors")


def test_padding_takes_no_more_memory_than_a_buffer(tmp_path: Path) -> None:
    hf = text_model(tmp_path / "hf")
    layout = Layout(llm_pp_layers=((5,),), tp_size=1, make_vocab_size_divisible_by=1 << 16)
    padded = TEXT.prepare_hf_to_mm(hf, tmp_path / "mm", layout)
    plain = TEXT.prepare_hf_to_mm(hf, tmp_path / "mm", replace(layout, make_vocab_size_divisible_by=0))
    assert padded.plan.nbytes > plain.plan.nbytes + 2 * (4 << 20) - 8192
    assert forecast(padded, workers=1).memory_bytes <= forecast(plain, workers=1).memory_bytes + 4096
    padded.run()
    assert len(held(tmp_path / "mm", 0)[EMBEDDING]) == 1 << 16


@pytest.mark.parametrize("tied", [False, True])
def test_a_padded_distributed_checkpoint_of_megatron_core(tmp_path: Path, tied: bool) -> None:
    hf = text_model(tmp_path / "hf", tied=tied)
    prepare_hf_to_torch_dist(TEXT, hf, tmp_path / "dist", make_vocab_size_divisible_by=PADDED).run()
    found = loaded(tmp_path / "dist/release")
    name = "embedding.word_embeddings.weight"
    assert torch.equal(found[name], rows_of_rank(tensors()["model.embed_tokens.weight"], PADDED, 1, 0)) or tied
    assert found[name].shape == (PADDED, HIDDEN)
    prepare_torch_dist_to_hf(TEXT, tmp_path / "dist", hf, tmp_path / "back").run()
    assert (tmp_path / "back/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    layout = Layout(llm_pp_layers=((2, 3),), tp_size=4, make_vocab_size_divisible_by=10)
    prepare_torch_dist_to_mm(TEXT, tmp_path / "dist", tmp_path / "mm", layout, hf_dir=hf).run()
    TEXT.hf_to_mm(hf, tmp_path / "expected", layout)
    assert weights(tmp_path / "mm") == weights(tmp_path / "expected")
    prepare_mm_to_torch_dist(TEXT, tmp_path / "mm", tmp_path / "again", make_vocab_size_divisible_by=PADDED).run()
    again = loaded(tmp_path / "again/release")
    assert all(torch.equal(again[key], tensor) for key, tensor in found.items())
    (tmp_path / "dist/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="padded_to_multiple_of"):
        prepare_torch_dist_to_hf(TEXT, tmp_path / "dist", hf, tmp_path / "back2")
    told = prepare_torch_dist_to_hf(TEXT, tmp_path / "dist", hf, tmp_path / "back2", padded_to_multiple_of=12)
    told.run()
    assert told.target.options["vocab_padding_dropped"] == (1 if tied else 2) * (PADDED - VOCAB)
    assert (tmp_path / "back2/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_pieces_of_a_padded_distributed_checkpoint(tmp_path: Path) -> None:
    """As megatron-core saves it at tensor parallel 4: the last rank's piece is padding alone."""
    from test_dcp import save_pieces

    hf = text_model(tmp_path / "hf")
    prepare_hf_to_torch_dist(TEXT, hf, tmp_path / "dist", make_vocab_size_divisible_by=64).run()
    found = loaded(tmp_path / "dist/release")
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        found[key][VOCAB:] = 5.0
    quarters = [(slice(16 * rank, 16 * rank + 16), slice(0, HIDDEN)) for rank in range(4)]
    cuts = {key: quarters if len(t) == 64 else [tuple(slice(0, n) for n in t.shape)] for key, t in found.items()}
    save_pieces(tmp_path / "ranks", found, cuts)
    assert DistributedFolder.open(tmp_path / "ranks").tensors["output_layer.weight"].shape == (64, HIDDEN)
    prepare_torch_dist_to_hf(TEXT, tmp_path / "ranks", hf, tmp_path / "back").run()
    assert (tmp_path / "back/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
