"""What npu-smi prints on each kind of card, and text that is no such table.

The files in ``data/npu_smi`` were printed by real drivers or by the vendor's documents; the expected values are what a
person reads in them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_envcheck.npu_smi import Chip, Process, Usage, chips, codes, counts, names, table, values

FILES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "data/npu_smi").glob("*.txt"))}
NONE = Usage(0, 0)

CHIPS = {
    "910b2": (
        Chip("910B2", "OK", 0, 0, None, 91.1, 49, NONE, "0000:C1:00.0", NONE, Usage(3372, 65536)),
        Chip("910B2", "OK", 1, 0, None, 91.6, 50, NONE, "0000:01:00.0", NONE, Usage(3373, 65536)),
    ),
    "910b4-busy": (Chip("910B4", "OK", 0, 0, None, 88.2, 30, NONE, "0000:C1:00.0", NONE, Usage(26838, 32768)),),
    "910b2c-processes": (),
    "a3": (
        Chip("Ascend910", "OK", 0, 0, 0, 178.8, 36, NONE, "0000:9D:00.0", NONE, Usage(3397, 65536)),
        Chip("Ascend910", "OK", 0, 1, 1, None, 36, NONE, "0000:9F:00.0", NONE, Usage(3186, 65536)),
    ),
    "a3-wide": (Chip("Ascend910", "OK", 0, 0, 0, 162.6, 34, NONE, "0000:9D:00.0", NONE, Usage(3419, 65536)),),
    "310p3-duo": (
        Chip("310P3", "OK", 1, 0, 0, None, 49, NONE, "0000:01:00.0", Usage(1448, 44278)),
        Chip("310P3", "OK", 1, 1, 1, None, 45, NONE, "0000:01:00.0", Usage(1511, 43693)),
    ),
    "310p3-hugepages": (
        Chip("310P3", "OK", 7, 0, 0, None, 28, NONE, "0000:00:07.0", Usage(1805, 21527)),
        Chip("310P3", "OK", 0, None, None, None, 49, Usage(8728, 8728)),
    ),
    "910prob": (Chip("910ProB", "OK", 0, 0, None, 82.0, 45, NONE, "0000:C1:00.0", Usage(945, 15137), Usage(0, 32768)),),
    "950": (Chip("950PR", "OK", 0, None, None, 204.4, 56, NONE, "0000:91:00.0", NONE, Usage(4439, 86016)),),
}
VERSIONS = {"910b2": "24.1.0", "a3-wide": "26.0.rc2", "310p3-duo": "25.5.1", "910prob": "22.0.4"}


def spoiled(text: str) -> list[str]:
    """Other line ends, blanks after the last bar, and what a Windows terminal makes of it."""
    return [text.replace("\n", "\r\n"), text.replace("|\n", "| \n"), "\ufeff" + text, text.replace("\n", "\n\n")]


@pytest.mark.parametrize("name", FILES)
def test_every_file(name: str) -> None:
    text = FILES[name]
    assert chips(text) == CHIPS.get(name, ())
    assert table(text).driver == VERSIONS.get(name, "")
    for other in spoiled(text):
        assert table(other) == table(text)


def test_no_file_is_left_out() -> None:
    assert len(FILES) == 19
    assert set(CHIPS) < set(FILES)


@pytest.mark.parametrize("row", ["Warning", "Alarm", "Critical", "UNKNOWN"])
def test_every_state_of_health(row: str) -> None:
    found = chips(FILES["a3"].replace("| OK ", f"| {row} ", 1))
    assert [chip.health for chip in found] == [row, "OK"]


def test_only_the_a3_has_physical_ids() -> None:
    assert {name for name in FILES if table(FILES[name]).physical_ids} == {"a3", "a3-wide", "map-a3", "map-950"}


def test_processes() -> None:
    assert table(FILES["910b2c-processes"]).processes == (Process(0, 0, 124528, "python3.8", 17400),)
    assert table(FILES["910b2"]).processes == ()
    on_950 = "| 3                         | 77            | torchrun                 | 40                       |"
    assert table(FILES["950"] + on_950).processes == (Process(3, None, 77, "torchrun", 40),)
    assert chips(FILES["950"] + on_950) == CHIPS["950"]


def test_an_added_column_moves_nothing() -> None:
    text = FILES["910b2"].replace("91.1        49 ", "91.1        49  7.5 ")
    assert chips(text) == CHIPS["910b2"]


def test_where_the_models_live() -> None:
    memory = {name: found[0].device_memory for name, found in CHIPS.items() if found}
    assert memory["310p3-duo"] == Usage(1448, 44278)
    assert memory["910prob"] == Usage(0, 32768)


def test_labels() -> None:
    assert [chip.label for chip in CHIPS["a3"]] == ["0", "0.1"]
    assert Chip("910B2", "OK").label == "?"


def test_full_hugepages() -> None:
    assert Usage(8728, 8728).full
    assert not Usage(0, 0).full
    assert not Usage(1, 2).full


def test_the_map_has_no_mcu() -> None:
    assert names(FILES["map-a2"]) == ("Ascend 910B3",)
    assert names(FILES["map-a3"]) == ("Ascend910", "Ascend910")
    assert names(FILES["map-950"]) == ("950PR",)
    assert names(FILES["910b2"]) == ()


def test_fields() -> None:
    assert values(FILES["board"], "Software Version") == ("25.5.1",)
    assert values(FILES["board"], "Compatibility") == ("OK",)
    assert values(FILES["board"], "Firmware Version") == (), "NA is no version"
    assert values(FILES["health"], "error code") == ()
    assert values(FILES["health"], "Health") == ("OK",)
    assert values(FILES["usages"], "HBM Capacity(MB)") == ("65536",)


def test_counts() -> None:
    assert counts(FILES["ecc"], "double bit error count") == (0,)
    assert counts(FILES["ecc"], "isolated pages count") == (0,)
    # as the reference of the Atlas 200I A2 spells it
    assert counts("        Double-bit Error Count                   : 2\n", "double bit error count") == (2,)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("driver-not-loaded", (-8005,)), ("device-in-use", (-8020,)), ("board-type", (-9005,)), ("910b2", ())],
)
def test_codes(name: str, expected: tuple[int, ...]) -> None:
    assert codes(FILES[name]) == expected


@settings(deadline=None)  # tests never time anything
@given(st.text(alphabet="|OK 910B\n\r-+=Alarm/:Phy-ID健康", max_size=300))
def test_no_text_is_too_odd(text: str) -> None:
    for chip in chips(text):
        assert chip.name
    for read in (names, codes, table):
        read(text)
    values(text, "Health")
    counts(text, "count")


@settings(deadline=None)
@given(st.sampled_from(sorted(CHIPS)), st.integers(0, 2000))
def test_a_table_that_was_cut_lists_a_part(name: str, length: int) -> None:
    whole, cut = chips(FILES[name]), chips(FILES[name][:length])
    assert [chip.name for chip in cut] == [chip.name for chip in whole[: len(cut)]]
