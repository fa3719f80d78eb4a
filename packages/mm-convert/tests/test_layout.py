import pytest

from mm_convert import Layout, LayoutError


def test_flat_list_is_one_virtual_stage() -> None:
    flat = Layout(llm_pp_layers=[12, 16], vit_pp_layers=[32, 0], tp_size=2)  # type: ignore[arg-type]
    nested = Layout(llm_pp_layers=[[12, 16]], vit_pp_layers=[[32, 0]], tp_size=2)  # type: ignore[arg-type]
    assert flat == nested
    assert (flat.pp_size, flat.vpp_size) == (2, 1)
    assert flat.rank_dir(1, 0) == "mp_rank_01_000"


def test_published_virtual_pipeline_places_embedding_after_leading_zeros() -> None:
    layout = Layout(
        llm_pp_layers=((0, 0, 0, 1), (4, 4, 4, 4), (4, 3, 2, 2)),
        vit_pp_layers=((10, 10, 10, 2), (0, 0, 0, 0), (0, 0, 0, 0)),
    )
    assert [layout.place(stage) for stage in layout.first_stages("llm")] == [(3, 0)]
    assert [layout.place(stage) for stage in layout.last_stages("llm")] == [(3, 2)]
    assert [layout.place(stage) for stage in layout.last_stages("vit")] == [(3, 0)]
    assert list(layout.stages("llm")[4]) == [1, 2, 3, 4]
    assert layout.section(4) == "model1"


def test_one_pipeline_rank_has_the_short_folder_name() -> None:
    assert Layout(llm_pp_layers=((4,),), vit_pp_layers=((2,),)).rank_dir(0, 0) == "mp_rank_00"


@pytest.mark.parametrize("lists", [[], [[]], [[1, 2], [3]], [[1, -1]], [["a"]], [1, [2]], [1.5]])
def test_lists_that_cannot_be(lists: list[object]) -> None:
    with pytest.raises(LayoutError, match=r"llm_pp_layers is .*\[\[12,16\]\] is 12 layers on the first"):
        Layout(llm_pp_layers=lists, vit_pp_layers=((1, 0),))  # type: ignore[arg-type]


def test_no_layer_at_all() -> None:
    with pytest.raises(LayoutError, match=r"llm_pp_layers is .*at least one of them above 0"):
        Layout(llm_pp_layers=((0, 0),))
    Layout(llm_pp_layers=((0, 0),), vit_pp_layers=((2, 1),))  # an adapter of the vision model alone


def test_different_shapes_and_sizes() -> None:
    with pytest.raises(LayoutError, match="different shapes"):
        Layout(llm_pp_layers=((1,),), vit_pp_layers=((2, 0),))
    with pytest.raises(LayoutError, match="tp_size is 0"):
        Layout(llm_pp_layers=((1,),), vit_pp_layers=((2,),), tp_size=0)


def test_wrong_sum_names_both_numbers_and_a_list_that_fits() -> None:
    layout = Layout(llm_pp_layers=((12, 12),), vit_pp_layers=((32, 0),))
    with pytest.raises(LayoutError, match=r"sum to 24, but the model has 28 llm layers.*\[\[14,14\]\] would fit"):
        layout.check_sums(llm_layers=28, vit_layers=32)
