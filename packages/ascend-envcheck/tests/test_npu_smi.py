"""Tables of several drivers and cards, and text that is no table."""

from __future__ import annotations

import pytest
from fake_machine import TABLE
from hypothesis import given
from hypothesis import strategies as st

from ascend_envcheck.npu_smi import chips

A3 = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 178.8       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3397 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | Warning       | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3186 / 65536         |
"""
ASCEND_950 = """\
| NPU ID | Name             | Health        | Power(W)    Temp(C)           Hugepages-Usage(page) |
|        |                  | Bus-Id        | NPU Util(%) Memory-Usage(MB)  HBM-Usage(MB)         |
+========+==================+===============+=====================================================+
| 0      | 950PR            | OK            | 204.4       56                0     / 0             |
|        |                  | 0000:91:00.0  | 0           0    / 0          4439  / 86016         |
"""
PROCESSES = """\
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 0       0                 | 124528        | python3.8                | 17400                   |
| No running processes found in NPU 1                                                            |
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TABLE, [("910B2", "OK")]),
        (A3, [("Ascend910", "OK"), ("Ascend910", "Warning")]),
        (ASCEND_950, [("950PR", "OK")]),
        ("| 7       310P3                 | OK              | NA           28                0    / 0              |",
         [("310P3", "OK")]),
        (TABLE + PROCESSES, [("910B2", "OK")]),
        ("dcmi module initialize failed. ret is -8005\n", []),
        ("", []),
    ],
)  # fmt: skip
def test_chips(text: str, expected: list[tuple[str, str]]) -> None:
    assert [(chip.name, chip.health) for chip in chips(text)] == expected
    assert chips(text.replace("\n", "\r\n")) == chips(text)
    assert chips(text.replace("|\n", "| \n")) == chips(text)


@given(st.text(alphabet="|OK 910B\n\r-+=Alarm", max_size=300))
def test_no_text_is_too_odd(text: str) -> None:
    for chip in chips(text):
        assert chip.name


@given(st.integers(0, len(TABLE)))
def test_a_table_that_was_cut(length: int) -> None:
    assert len(chips(TABLE[:length])) <= 1
