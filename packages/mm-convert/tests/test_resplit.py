"""From one layout to another: the very files that hf_to_mm would write."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import published_models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed_runs import files
from test_bad_input import hf_to_mm, refused
from test_streaming import child
from tiny_checkpoint import LLM_LAYERS, VIT_LAYERS, MakeModel, save_model, tensors

from mm_convert import CheckpointError, Converter, Layout, LayoutError, MegatronFolder, TotalityError
from mm_convert.cli import main
from mm_convert.plans import Plan, Ref, Segment, Spec
from mm_convert.resplit import compose

QWEN = Converter.named("Qwen2_5_VLConverter")
ONE = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))
TWO = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2)
FOUR = Layout(llm_pp_layers=((0, 1, 2, 2),), vit_pp_layers=((2, 1, 0, 0),), tp_size=4)
VIRTUAL = Layout(llm_pp_layers=((0, 1), (2, 2)), vit_pp_layers=((3, 0), (0, 0)), tp_size=2)
EMPTY = Layout(llm_pp_layers=((5,), (0,)), vit_pp_layers=((3,), (0,)))


def weights(folder: Path) -> dict[str, bytes]:
    """Everything but the manifest, which says how it was made."""
    return {name: data for name, data in files(folder).items() if name != "manifest.json"}


def resplit(a: Path, b: Path, llm: str, vit: str, tp: int, *more: str) -> list[str]:
    return [
        "Qwen2_5_VLConverter", "resplit", "--cfg.source_dir", str(a), "--cfg.target_dir", str(b),
        "--cfg.target_parallel_config.llm_pp_layers", llm, "--cfg.target_parallel_config.vit_pp_layers", vit,
        "--cfg.target_parallel_config.tp_size", str(tp), *more,
    ]  # fmt: skip


LAYOUTS = {"one": ONE, "two": TWO, "four": FOUR, "virtual": VIRTUAL, "empty": EMPTY}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``{tied|untied}/hf``, and what hf_to_mm makes of it in each layout."""
    folder = tmp_path_factory.mktemp("written")
    for kind in ("tied", "untied"):
        tied = kind == "tied"
        hf = save_model(folder / kind / "hf", tensors(tied=tied), tied=tied)
        for name, layout in LAYOUTS.items():
            QWEN.hf_to_mm(hf, folder / kind / name, layout)
    return folder


PAIRS = list(permutations(LAYOUTS, 2))
# Whether the model is tied shows in the number of pipeline ranks alone.
TIED = [pair for pair in PAIRS if {*pair} <= {"one", "two", "virtual"}]


@pytest.mark.parametrize(
    ("source", "target", "kind"), [(*pair, "untied") for pair in PAIRS] + [(*pair, "tied") for pair in TIED]
)
def test_equals_what_hf_to_mm_writes(source: str, target: str, kind: str, written: Path, tmp_path: Path) -> None:
    a, expected = written / kind / source, written / kind / target
    # Heads are not to be had from tiny tensors; they matter only where ranks become more.
    more = LAYOUTS[source].tp_size % LAYOUTS[target].tp_size
    QWEN.resplit(a, tmp_path / "b", LAYOUTS[target], hf_dir=written / kind / "hf" if more else None)
    assert weights(tmp_path / "b") == weights(expected)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layout_to_any_other(
    data: st.DataObject, make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def layout() -> Layout:
        pp, vpp = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
        llm, vit = (_dealt(data, total, pp, vpp) for total in (LLM_LAYERS, VIT_LAYERS))
        return Layout(llm_pp_layers=llm, vit_pp_layers=vit, tp_size=data.draw(st.sampled_from([1, 2, 4])))

    tmp_path = tmp_path_factory.mktemp("any")
    hf, source, target = make_model(tmp_path.name, tied=data.draw(st.booleans())), layout(), layout()
    QWEN.hf_to_mm(hf, tmp_path / "a", source)
    QWEN.hf_to_mm(hf, tmp_path / "expected", target)
    QWEN.resplit(tmp_path / "a", tmp_path / "b", target, hf_dir=hf)
    assert weights(tmp_path / "b") == weights(tmp_path / "expected")


def _dealt(data: st.DataObject, total: int, pp: int, vpp: int) -> tuple[tuple[int, ...], ...]:
    cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    return tuple(tuple(counts[v * pp : (v + 1) * pp]) for v in range(vpp))


def test_the_published_line_with_lists_as_a_check(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(hf_to_mm(make_model(), tmp_path / "a", tp=2)) == 0
    source = "--cfg.source_parallel_config."
    given = [f"{source}llm_pp_layers", "[2,3]", f"{source}vit_pp_layers", "[[3,0]]", f"{source}tp_size", "2"]
    assert main(resplit(tmp_path / "a", tmp_path / "b", "[1,4]", "[3,0]", 1, *given)) == 0
    assert "every source byte used" in capsys.readouterr().out
    assert MegatronFolder.open(tmp_path / "b").layout == Layout(llm_pp_layers=((1, 4),), vit_pp_layers=((3, 0),))
    for wrong in ([f"{source}llm_pp_layers", "[3,2]"], [f"{source}tp_size", "1"]):
        line = resplit(tmp_path / "a", tmp_path / "c", "[1,4]", "[3,0]", 1, *wrong)
        refused(line, tmp_path / "c", capsys, "given: ", wrong[1].replace("[3,2]", "[[3,2]]"), "holds: llm_pp_layers")


def test_more_ranks_need_the_number_of_heads(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, a, b = make_model(), tmp_path / "a", tmp_path / "b"
    assert main(hf_to_mm(hf, a)) == 0
    capsys.readouterr()
    words = ["tp_size 2", "key/value heads", "legal without knowing more: [1]", "--cfg.hf_config.hf_dir"]
    refused(resplit(a, b, "[5]", "[3]", 2), b, capsys, *words)
    # config.json is all that is read of the folder.
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "config.json").write_bytes((hf / "config.json").read_bytes())
    told = ["--cfg.hf_config.hf_dir", str(tmp_path / "only")]
    refused(resplit(a, b, "[5]", "[3]", 8, *told), b, capsys, "tp_size 8", "num_key_value_heads, 4", "[1, 2, 4]")
    assert main(resplit(a, b, "[5]", "[3]", 2, *told)) == 0


@pytest.mark.parametrize(("name", "legal", "illegal"), [("3B", 2, 4), ("7B", 4, 8)])
def test_published_models_are_known_by_their_shapes(name: str, legal: int, illegal: int, tmp_path: Path) -> None:
    """Legal sizes are the divisors of the key/value heads that the models' config.json files state."""
    hf = published_models.save(tmp_path / "hf", name)
    layers = published_models.MODELS[name].layers
    layout = Layout(llm_pp_layers=((layers,),), vit_pp_layers=((32,),))
    mm = on_paper(QWEN.prepare_hf_to_mm(hf, tmp_path / "mm", layout).plan, layout, tmp_path)
    plan = QWEN.plan_resplit(mm, Layout(llm_pp_layers=((layers,),), vit_pp_layers=((32,),), tp_size=legal))
    assert plan.nbytes >= mm_bytes(mm)
    with pytest.raises(LayoutError, match=rf"tp_size {illegal} does not divide num_key_value_heads, {legal}"):
        QWEN.plan_resplit(mm, Layout(llm_pp_layers=((layers,),), vit_pp_layers=((32,),), tp_size=illegal))


def on_paper(plan: Plan, layout: Layout, directory: Path) -> MegatronFolder:
    return MegatronFolder(directory=directory, layout=layout, tensors=dict(plan.targets), files={})


def mm_bytes(mm: MegatronFolder) -> int:
    return sum(spec.nbytes for spec in mm.tensors.values())


def edit(folder: Path, rank: str, name: str, change: object) -> None:
    path = folder / "release" / rank / "model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    made = change(content["model"][name]) if callable(change) else None
    content["model"] = {n: t for n, t in content["model"].items() if n != name} | ({} if made is None else {name: made})
    torch.save(content, path)


NORM = "text_decoder.decoder.final_layernorm.weight"
OUTPUT = "text_decoder.output_layer.weight"
FC1 = "text_decoder.decoder.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("rank", "name", "change", "words"),
    [
        ("mp_rank_00_001", NORM, None, "lacks 1 tensors: mp_rank_00_001/.*final_layernorm"),
        ("mp_rank_01_001", NORM, None, r"missing 1: mp_rank_01_001/.*final_layernorm"),
        ("mp_rank_01_001", NORM, lambda t: t + 1, "final_layernorm.weight in mp_rank_01_001.* must equal"),
        ("mp_rank_01_001", NORM, lambda t: t.half(), "different dtypes on its ranks: .*is F16, elsewhere F32"),
        ("mp_rank_01_000", FC1, lambda t: t[:-2].clone(), r"linear_fc1.weight is \[22, 16\], expected \[24, 16\]"),
        ("mp_rank_00_000", FC1, lambda t: t[0].clone(), "wrong shape"),
    ],
)
def test_a_source_that_is_not_whole(
    rank: str, name: str, change: object, words: str, make_model: MakeModel, tmp_path: Path
) -> None:
    QWEN.hf_to_mm(make_model(), tmp_path / "a", TWO)
    edit(tmp_path / "a", rank, name, change)
    with pytest.raises(CheckpointError, match=words):
        QWEN.resplit(tmp_path / "a", tmp_path / "b", ONE)
    assert not (tmp_path / "b").exists()


def test_an_output_layer_that_differs_is_no_copy_of_the_embedding(make_model: MakeModel, tmp_path: Path) -> None:
    """Only its bytes tell; config.json, if given, is believed, and checked."""
    hf = make_model(tied=True)
    QWEN.hf_to_mm(hf, tmp_path / "a", TWO)
    QWEN.resplit(tmp_path / "a", tmp_path / "tied", ONE)
    assert OUTPUT not in {ref.name for ref in MegatronFolder.open(tmp_path / "tied").tensors}
    edit(tmp_path / "a", "mp_rank_01_001", OUTPUT, lambda t: t + 1)
    QWEN.resplit(tmp_path / "a", tmp_path / "untied", ONE)
    assert OUTPUT in {ref.name for ref in MegatronFolder.open(tmp_path / "untied").tensors}
    with pytest.raises(CheckpointError, match=r"output_layer.weight in .* must equal .*word_embeddings"):
        QWEN.resplit(tmp_path / "a", tmp_path / "c", ONE, hf_dir=hf)


def test_torch_stays_out_and_memory_is_a_few_buffers(written: Path, tmp_path: Path) -> None:
    a, b = written / "tied" / "two", tmp_path / "b"
    for line in (resplit(a, b, "[5]", "[3]", 1), ["verify", str(a), str(b), "--full"], ["diff", str(a), str(b)]):
        code, peak, heavy = child(line)
        assert (code, heavy) == (0, [])
        assert peak < 100


def test_a_resplit_goes_on_where_it_was_broken_off(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "a", TWO)
    QWEN.resplit(tmp_path / "a", tmp_path / "b", ONE, resume=True)
    before = (tmp_path / "b" / "manifest.json").stat().st_mtime_ns
    QWEN.resplit(tmp_path / "a", tmp_path / "b", ONE, resume=True)
    assert (tmp_path / "b" / "manifest.json").stat().st_mtime_ns == before
    options = json.loads((tmp_path / "b" / "manifest.json").read_text())["options"]
    assert options == {"command": "resplit", "source_layout": str(TWO), "layout": str(ONE)}


X, Y, Z = (Ref(name, "", name) for name in "xyz")
PAPER = Ref("", "", "paper")


def test_neighbouring_ranges_become_one_and_copies_are_compared_once() -> None:
    halves = [Segment(PAPER, 2 * n, X, 2 * n, 2, 0) for n in range(2)]
    copies = [s._replace(target=Y) for s in halves]
    wanted = [Segment(PAPER, 0, ref, 0, 4, 0) for ref in (Z, X)]
    made = compose(halves + copies, wanted)
    assert made == [Segment(X, 0, Z, 0, 4, 0), Segment(X, 0, X, 0, 4, 0), Segment(Y, 0, Z, 0, 4, 0)]
    spec = Spec("F32", (4, 2))
    plan = Plan.build({X: spec, Y: spec}, {Z: spec, X: spec}, made)
    assert {ref: len(checks) for ref, checks in plan.checks.items()} == {Z: 1}
    with pytest.raises(TotalityError):
        Plan.build({X: spec, Y: spec, Z: spec}, {Z: spec, X: spec}, made)
