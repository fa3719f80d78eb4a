"""What `explain` says about whole logs.

The logs beside this file are made by hand in the documented formats; the first line of each says what happened, and
was written before the log was ever explained. It is not part of the log.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import IO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_envcheck.cli import main
from ascend_envcheck.explanation import Explanation, explain, explain_files
from ascend_envcheck.explanation.scan import Scan
from ascend_envcheck.explanation.text import render
from ascend_envcheck.failures import CLUES, INFO, ROOT, TIERS, WRAPPER

LOGS = sorted((Path(__file__).parent / "logs").glob("*.log"))
ATB = "ImportError: libatb.so: cannot open shared object file: No such file or directory"
OOM = "RuntimeError: NPU out of memory. Tried to allocate 386.00 MiB"


def read(path: Path) -> tuple[str, str]:
    truth, _, log = path.read_text(encoding="utf-8").partition("\n")
    return truth.replace("# truth: ", ""), log


def ids(explanation: Explanation, tier: str) -> list[str]:
    return [found.failure.id for found in explanation.found if found.tier == tier]


def of_kind(*words: str) -> list[Path]:
    return [path for path in LOGS if read(path)[0].split(";")[0].split()[0] in words]


FAILED = [path for path in LOGS if path not in of_kind("none", "unknown", "follower")]


@pytest.mark.parametrize("path", FAILED, ids=lambda path: path.stem)
def test_a_failed_log_names_its_cause_first(path: Path) -> None:
    truth, log = read(path)
    explanation = explain(log)
    assert explanation.cause is not None
    assert explanation.cause.failure.id == truth.split()[0]
    assert ids(explanation, ROOT) == truth.split()
    assert all(found.follows in truth.split() for found in explanation.found if found.tier == WRAPPER)
    assert explanation.status == "explained"
    assert explanation.lines == log.count("\n")


def test_there_are_enough_logs() -> None:
    assert len(FAILED) >= 15
    assert len(of_kind("none")) >= 4


@pytest.mark.parametrize("path", of_kind("none"), ids=lambda path: path.stem)
def test_a_healthy_log_has_no_error(path: Path) -> None:
    _, log = read(path)
    explanation = explain(log)
    assert log.count("\n") > 80
    assert explanation.status == "no error"
    assert {found.tier for found in explanation.found} <= {INFO}
    assert explanation.unknown == ()


@pytest.mark.parametrize("path", of_kind("unknown"), ids=lambda path: path.stem)
def test_a_bug_of_the_user_is_unknown_and_shown(path: Path) -> None:
    truth, log = read(path)
    explanation = explain(log)
    assert explanation.status == "unknown"
    assert explanation.found == ()
    assert explanation.unknown[-1].line == int(truth.split()[-1])


@pytest.mark.parametrize("path", of_kind("follower"), ids=lambda path: path.stem)
def test_followers_alone_are_no_cause(path: Path) -> None:
    explanation = explain(read(path)[1])
    assert explanation.cause is None
    assert {"EI0002", "EI0006"} <= set(ids(explanation, WRAPPER))
    assert all(not found.follows for found in explanation.found)
    assert "no root cause" in render(explanation)


def test_a_wrapper_loses_to_a_root_wherever_it_stands() -> None:
    wrapper = "[ERROR] 2025-04-04-21:26:55 (PID:1310, Device:0, RankID:-1) ERR00100 PTA call acl api failed"
    for log in (f"{wrapper}\n{OOM}", f"{OOM}\n{wrapper}"):
        explanation = explain(log)
        assert [found.failure.id for found in explanation.found] == ["PTA-ERR00006", "PTA-ERR00100"]
        assert explanation.found[1].follows == "PTA-ERR00006"


def test_a_wrapper_follows_the_last_root_before_it() -> None:
    wrapper = "EI0002: The wait execution of the Notify register times out."
    explanation = explain(f"{ATB}\n{OOM}\n{wrapper}\nOSError: [Errno 28] No space left on device\n")
    assert ids(explanation, ROOT) == ["LIB-ATB", "PTA-ERR00006", "DISK-FULL"]
    assert [found.follows for found in explanation.found if found.tier == WRAPPER] == ["PTA-ERR00006"]


def test_the_rank_that_said_it_first() -> None:
    explanation = explain(f"start\n[rank3]: {ATB}\n[rank0]: {ATB}\n[rank1]: {ATB}\n")
    assert explanation.cause is not None
    assert (explanation.cause.first.rank, explanation.cause.first.line, explanation.cause.count) == ("3", 2, 3)
    assert "rank 3 said it first, 3 times" in render(explanation)
    assert "rank 3 最先报出" in render(explanation, "zh")


def plog(second: int, text: str) -> str:
    return f"[ERROR] HCCL(1,python):2025-11-19-12:00:{second:02d}.123.456 [a.cc:1]{text}\n"


def test_across_files_the_earliest_is_first() -> None:
    late, early = (
        plog(30, "EI0012: SDMA memory copy task exception occurred."),
        plog(10, "EJ0002: The network port is down."),
    )
    explanation = explain_files([("plog-1.log", late), ("plog-2.log", early + plog(9, "INFO"))])
    assert ids(explanation, ROOT) == ["EJ0002", "EI0012"]
    assert explanation.cause is not None
    assert (explanation.cause.first.file, explanation.cause.first.time) == ("plog-2.log", "2025-11-19 12:00:10.123456")


def test_across_files_an_entry_moves_to_its_earliest_line() -> None:
    both = [("a.log", plog(30, "EJ0002: x")), ("b.log", plog(20, "EJ0002: x")), ("c.log", plog(25, "EJ0002: x"))]
    found = explain_files(both).found
    assert [(one.first.file, one.count) for one in found] == [("b.log", 3)]


def test_across_files_without_times_the_order_is_that_of_the_files() -> None:
    explanation = explain_files([("a.log", OOM), ("b.log", plog(1, "EJ0002: x"))])
    assert ids(explanation, ROOT) == ["PTA-ERR00006", "EJ0002"]


def test_a_time_may_stand_on_a_line_before() -> None:
    cause = explain(f"2025-11-19 12:00:07,250 start\nnothing\n{OOM}\n").cause
    assert cause is not None
    assert cause.first.time == "2025-11-19 12:00:07.250000"


@pytest.mark.parametrize(
    "level", ["[INFO] HCCL(1,python):x [a.cc:1]", "2025-11-19 12:00:00,000 - DEBUG - ", "INFO 06-03 12:00 a.py:1] "]
)
def test_what_is_only_told_is_no_cause(level: str) -> None:
    assert ids(explain(f"{level}{ATB}\nKeyError: 1\n"), INFO) == ["LIB-ATB"]


def test_what_is_only_warned_of_is_perhaps_a_cause() -> None:
    warned = f"WARNING 06-03 14:53:54 registry.py: {ATB}\n"
    assert ids(explain(f"{warned}KeyError: 1\n"), "generic") == ["LIB-ATB"]
    assert ids(explain(f"{warned}all is well\n"), INFO) == ["LIB-ATB"]
    assert ids(explain(f"{warned}{ATB}\n"), ROOT) == ["LIB-ATB"]


def test_unknown_lines_are_few_and_hold_the_end() -> None:
    log = "".join(f"[ERROR] {chr(97 + i)} failed\n" for i in range(20)) + "ValueError: the last\n"
    explanation = explain(log)
    assert len(explanation.unknown) == 8
    assert [place.line for place in explanation.unknown] == [1, 2, 3, 4, 5, 6, 7, 21]


def test_the_same_unknown_line_is_kept_once() -> None:
    assert len(explain("".join(f"[ERROR] step {i} failed\n" for i in range(20))).unknown) == 1


@pytest.mark.parametrize(
    "line", ["info: 0 errors", "no Error in it", "my_error_rate 0.1", "E12345678", "[WARNING] error: x"]
)
def test_lines_that_are_no_errors(line: str) -> None:
    assert explain(line).status == "no error"


# ------------------------------------------------------------------------------------------------- forms of a log


def test_text_bytes_lines_and_files_say_the_same(tmp_path: Path) -> None:
    _, log = read(FAILED[0])
    (tmp_path / "a.log").write_text(log, encoding="utf-8")
    expected = explain(log)
    assert explain(log.encode()) == expected
    assert explain(log.splitlines()) == expected
    assert explain(line for line in log.splitlines(keepends=True)) == expected
    assert explain(io.StringIO(log)) == expected
    with (tmp_path / "a.log").open("rb") as file:
        assert explain(file) == expected


def test_windows_line_ends_and_colours() -> None:
    cause = explain(f"a\r\n\x1b[31m{ATB[:20]}\x1b[1m{ATB[20:]}\x1b[0m\r\nb\r\n").cause
    assert cause is not None
    assert (cause.first.line, cause.first.text) == (2, ATB)


def test_a_progress_bar_before_the_error() -> None:
    bar = "\r".join(f"{step}%|###| {step}/100 [00:01<00:00, 1.9it/s]" for step in range(100))
    cause = explain(f"{bar}\r{ATB}\n").cause
    assert cause is not None
    assert (cause.first.line, cause.first.text) == (1, ATB)


def test_an_endless_line_is_cut() -> None:
    cause = explain("x" * 3_000_000 + " " + OOM + " " + "y" * 3_000_000).cause
    assert cause is not None
    assert cause.first.line == 1
    assert len(cause.first.text) <= 300


def test_bytes_that_are_no_text() -> None:
    cause = explain(b"\xff\xfe\x80 " + ATB.encode() + b"\x80\x1b]0;title\x07").cause
    assert cause is not None
    assert cause.first.text.isprintable()


@pytest.mark.parametrize("clue", CLUES)
def test_every_clue_is_looked_for(clue: str) -> None:
    log = f"all is well\nit was {clue} there\nall is well\n"
    assert [suspect.number for suspect in Scan([log.encode()])] == [2]


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 4000), max_size=12), path=st.sampled_from(LOGS))
def test_blocks_may_end_anywhere(cuts: list[int], path: Path) -> None:
    log = read(path)[1].encode()
    edges = sorted({0, len(log), *(cut for cut in cuts if cut < len(log))})
    pieces = [log[start:end] for start, end in zip(edges, edges[1:])]
    whole = [(suspect.number, suspect.text) for suspect in Scan([log])]
    assert [(suspect.number, suspect.text) for suspect in Scan(pieces)] == whole


@settings(deadline=None)
@given(st.binary(max_size=3000))
def test_junk_is_answered(junk: bytes) -> None:
    explanation = explain(junk)
    assert explanation.status in ("explained", "unknown", "no error")
    assert explanation.lines == len(junk.split(b"\n")) - junk.endswith(b"\n") - (not junk)
    assert render(explanation).endswith("\n")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mutated_logs_are_answered(seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray("\n".join(read(path)[1] for path in chance.sample(LOGS, 3)).encode())
    for _ in range(50):
        at = chance.randrange(len(data))
        data[at : at + chance.choice((0, 1, 40))] = chance.choice(
            (b"", b"\n", b"\r", b"\0", b"E", b"\x1b[", b"\xff", b"EZ9999")
        )
    explanation = explain(bytes(data))
    tiers = [TIERS.index(found.tier) for found in explanation.found]
    assert tiers == sorted(tiers)
    assert all(1 <= found.first.line <= explanation.lines for found in explanation.found)
    json.loads(explanation.to_json())
    render(explanation, "zh")


class Endless(io.RawIOBase):
    """A file that repeats a piece of a log."""

    def __init__(self, piece: bytes, times: int) -> None:
        self._piece, self._left = piece, times

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        return self._piece if self._left >= 0 else b""


def test_memory_does_not_grow_with_the_log() -> None:
    step = "iteration {} | lm loss: 2.1 | number of skipped iterations: 0"
    lines = [step.format(i) if i % 20 else f"[ERROR] step {i} failed" for i in range(999)]
    piece = ("\n".join([*lines, ATB]) + "\n").encode()

    def peak(times: int) -> int:
        tracemalloc.start()
        assert explain(cast(IO[bytes], Endless(piece, times))).lines == 1000 * times
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(1)  # the table is read once
    assert peak(60) < peak(2) + 2**20


def test_two_hundred_thousand_lines() -> None:
    piece = (" iteration | elapsed time per iteration (ms): 870.0 | loss: 1.2E+01 |\n" * 2000).encode()
    tracemalloc.start()
    explanation = explain(cast(IO[bytes], Endless(piece, 100)))
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (explanation.lines, explanation.status) == (200_000, "no error")
    assert top < 16 * 2**20


# --------------------------------------------------------------------------------------------------------- command


def test_command_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_text(f"start\n{ATB}\n", encoding="utf-8")
    assert main(["explain", str(tmp_path / "train.log"), "--lang", "en"]) == 0
    shown = capsys.readouterr().out
    assert "CAUSE    LIB-ATB  line 2\n" in shown
    assert "source /usr/local/Ascend/nnal/atb/set_env.sh" in shown
    assert shown.splitlines()[-1].startswith("the most likely cause is LIB-ATB: libatb.so")


def test_command_in_chinese(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_text(f"{ATB}\n", encoding="utf-8")
    assert main(["explain", str(tmp_path / "train.log"), "--lang", "zh"]) == 0
    assert "最可能的原因是 LIB-ATB" in capsys.readouterr().out


def test_command_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_text(f"[rank1]: {ATB}\n", encoding="utf-8")
    assert main(["explain", str(tmp_path / "train.log"), "--json", "--lang", "zh"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["status"], told["lines"]) == ("explained", 1)
    assert told["found"][0]["cause"].startswith("libatb.so is not")
    assert {"id", "tier", "cause", "fix", "source", "confidence", "file", "line", "rank", "count"} <= set(
        told["found"][0]
    )


def test_command_on_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"all is well\n")))
    assert main(["explain", "-", "--lang", "en"]) == 0
    assert capsys.readouterr().out == "no error; lines read: 1\n"


def test_command_on_a_folder_reads_all_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "debug" / "plog").mkdir(parents=True)
    (tmp_path / "debug" / "plog" / "plog-2_1.log").write_text(plog(10, "EJ0002: x"), encoding="utf-8")
    (tmp_path / "debug" / "plog" / "plog-1_1.log").write_text(plog(20, "EI0012: x"), encoding="utf-8")
    (tmp_path / "notes.txt").write_text(OOM, encoding="utf-8")
    assert main(["explain", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [found["id"] for found in told["found"]] == ["EJ0002", "EI0012"]
    assert told["found"][0]["file"] == "plog-2_1.log"


def test_unknown_errors_exit_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_text("Traceback (most recent call last):\nKeyError: 'x'\n", encoding="utf-8")
    assert main(["explain", str(tmp_path / "train.log"), "--lang", "en"]) == 1
    shown = capsys.readouterr().out
    assert "UNKNOWN  line 2\n         > KeyError: 'x'" in shown
    assert shown.splitlines()[-1].startswith("unknown: ")


def test_wrong_calls_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.gz").write_bytes(b"\x1f\x8b\0\0\0")
    for path, why in (
        (tmp_path / "none.log", "No such file"),
        (tmp_path / "log.gz", "is not text"),
        (tmp_path, r"no *.log is in"),
    ):
        assert main(["explain", str(path)]) == 2
        assert why in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_bytes(b"\x1b]0;hacked\x07\x9b31m\x08" + OOM.encode() + b"\x1b[2J\x07\n")
    assert main(["explain", str(tmp_path / "train.log")]) == 0
    assert all(character.isprintable() or character == "\n" for character in capsys.readouterr().out)


def test_interruption_is_clean(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Interrupted()))
    assert main(["explain", "-"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    (tmp_path / "long.log").write_bytes(b"all is well\n" * 200_000)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["explain", str(tmp_path / "long.log")]) == 0
    shown = terminal.getvalue()
    assert "long.log: 2 MB" in shown
    assert shown.endswith("\r\x1b[K")


def test_several_files_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrapper = "[ERROR] 2025-04-04-21:26:55 (PID:1310, Device:0, RankID:-1) ERR00100 PTA call acl api failed"
    for node, text in (("node-1", f"{wrapper}\n"), ("node-2", f"{ATB}\n{wrapper}\n")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "train.log").write_text(text, encoding="utf-8")
    assert main(["explain", *(str(path / "train.log") for path in sorted(tmp_path.iterdir())), "--lang", "en"]) == 0
    shown = capsys.readouterr().out
    assert "CAUSE    LIB-ATB  line 1 of node-2/train.log\n" in shown
    assert "what followed: PTA-ERR00100 (line 1 of node-1/train.log)" in shown
