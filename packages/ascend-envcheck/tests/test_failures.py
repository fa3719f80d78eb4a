"""The table of failures is sound, each example is explained by its own row, and the quick search loses nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_envcheck import RULES
from ascend_envcheck.failures import CLUES, TIERS, Failure, failures, match, plain_texts
from ascend_envcheck.messages import CHINESE, told

ROWS = failures()
PLACES = {failure.id: place for place, failure in enumerate(ROWS)}
CONFIDENCE = {"vendor text", "public issue", "general knowledge", "derived"}
CJK = re.compile("[一-鿿]")


@pytest.mark.parametrize("failure", ROWS, ids=lambda failure: failure.id)
def test_each_example_is_explained_by_its_own_row(failure: Failure) -> None:
    found = match(failure.example)
    assert found is not None
    assert found.id == failure.id


def test_every_row_is_sound() -> None:
    assert len(ROWS) > 160
    for failure in ROWS:
        assert failure.tier in TIERS, failure.id
        assert failure.confidence in CONFIDENCE, failure.id
        assert failure.source, failure.id
        assert failure.category, failure.id
        assert failure.codes or failure.pattern, failure.id
        assert CJK.search(told(failure.cause, CHINESE)), failure.id
        assert not CJK.search(failure.cause + failure.fix), failure.id
        assert "\n" not in failure.cause + failure.fix, failure.id


def test_commands_are_the_same_in_both_languages() -> None:
    commands = re.compile(
        r"(?:pip|conda|docker|export|npu-smi|hccn_tool|ascend-envcheck|source /|git) [ -:=-~]*[!-:=-~]"
    )
    for failure in ROWS:
        chinese = told(failure.fix, CHINESE)
        if CJK.search(chinese):
            names = [found.group().split()[0] for found in commands.finditer(chinese)]
            for name in names:
                assert name in failure.fix, failure.id


def test_no_two_rows_share_a_pattern_or_a_code() -> None:
    patterns = [branch for failure in ROWS if failure.pattern for branch in failure.pattern.split("|")]
    assert len(patterns) > 100
    assert len({failure.pattern for failure in ROWS if failure.pattern}) == sum(
        bool(failure.pattern) for failure in ROWS
    )
    codes = [code for failure in ROWS for code in failure.codes]
    assert len(set(codes)) == len(codes)


# The walk-through, and the documents that the rows name, tell these by their words.
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[rank3]: OSError: libatb.so: cannot open shared object file: No such file or directory", "LIB-ATB"),
        ("RuntimeError: call aclnnCast failed, detail:EZ9999: Inner Error!", "EZ9999"),
        ("EZ9999: 2024-06-28-13:05:55.631.066  Parse dynamic kernel config fail.", "OPBIN-PARSE"),
        ("NPU function error: c10_npu::SetDevice, error code is 507033", "ACL-507033"),
        ("rtGetDeviceCount:ErrCode=507899", "ACL-507899"),
        ("[ERROR] RUNTIME(1,python):x [a.cc:1]stream sync failed, retCode=507015", "ACL-507015"),
        ("aclInit failed, ret: 507008", "ACL-507008"),
        ("aclInit failed, ret=507008", "ACL-507008"),
        ("ValueError: num_query_groups (4) must be a multiple of tensor_model_parallel_size (8).", "TP-KV"),
        ("ModuleNotFoundError: No module named 'torch_npu'", "IMPORT-NPU"),
        ("ModuleNotFoundError: No module named 'torch_npu._C'", "IMPORT-C"),
        ("ModuleNotFoundError: No module named 'tensorboard'", None),
        ("ImportError: /a/_C.cpython-310-aarch64-linux-gnu.so: undefined symbol: _ZN3c1021throw", "ABI-C10"),
        ("train.sh: line 12: 12345 Killed                  python train.py", "OOM-KILL"),
        ("[ERROR] 2025-06-09-06:57:54 (PID:92380, Device:0, RankID:-1) ERR01005 OPS internal error", "PTA-ERR99999"),
        ("EE9999: Inner Error!", "INNER-9999"),
    ],
)
def test_known_lines(line: str, expected: str | None) -> None:
    found = match(line)
    assert (found and found.id) == expected


@pytest.mark.parametrize(
    "line",
    [
        "stream_id=3, task_id=507011, flip_num=0",
        "(pid=507011) error in line 3",
        "[INFO] custom opp_kernel path is /usr/local/Ascend/cann/opp_kernel",
        "  num_key_value_heads ............................ 4",
        "num_key_value_heads=4, path=http://host/tp8",
        "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True,max_split_size_mb:32",
        "libdecord.so is loaded from /usr/lib",
        "amp_C fused kernels are not used",
        "forcefully exiting via SIGKILL",
        "        Compatibility                  : OK",
        "| 0     910B2               | OK            | 90.1        50                0    / 0             |",
        "HCCL_SOCKET_IFNAME not set",
        "port 60000 is used, no failure",
        "bfloat16 is not supported on CPU, float32 is used",
        "Errno 240 is no number",
        "FEE1001A, 0xEI0006F, XEZ9999",
        "",
    ],
)
def test_harmless_lines_are_not_explained(line: str) -> None:
    assert match(line) is None


@pytest.mark.parametrize("failure", [failure for failure in ROWS if failure.pattern], ids=lambda failure: failure.id)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_the_quick_search_loses_nothing(failure: Failure, data: st.DataObject) -> None:
    """Whatever a pattern matches is explained, by its row or an earlier one, and holds a clue."""
    line = data.draw(st.from_regex(re.compile(failure.pattern)))
    found = match(line)
    assert found is not None
    assert PLACES[found.id] <= PLACES[failure.id]
    assert any(clue in line for clue in CLUES)


def test_no_pattern_can_take_for_ever() -> None:
    """Two unlimited repetitions in a branch cost the cube of the length of a line that is made for it."""
    for failure in ROWS:
        for branch in failure.pattern.split("|"):
            assert len(re.findall(r"(?:\]|\.)[*+]", branch)) <= 1, failure.id


def test_every_branch_has_a_text_to_look_for() -> None:
    for failure in ROWS:
        for texts in plain_texts(failure.pattern) if failure.pattern else ():
            assert max(map(len, texts)) >= 4, failure.id


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("plain", ["plain"]),
        (r"one\.so|two", ["one.so", "two"]),
        (r"lib[^\n]*open", ["lib+open"]),
        (r"driver(?:s)?x", ["driver+x"]),
        (r"colou?r", ["colo+r"]),
        (r"a{2}bc", ["bc"]),
        (r"(?:not|in) groups", [" groups"]),
        (r"\bEI\d{4}\b", ["EI"]),
        (r"[|(]pipe", ["pipe"]),
        (r"end+s", ["end+s"]),
    ],
)
def test_plain_texts(pattern: str, expected: list[str]) -> None:
    assert ["+".join(filter(None, texts)) for texts in plain_texts(pattern)] == expected


@given(st.text())
def test_any_text_is_answered(text: str) -> None:
    match(text)


def test_a_rule_that_a_fix_names_exists() -> None:
    ids = {rule.id for rule in RULES}
    named = [name for row in failures() for given in re.findall(r"--only (\S+)", row.fix) for name in given.split(",")]
    assert named
    assert set(named) <= ids
