"""The command."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_all

from dit_ulysses import Costs, ParallelPlan
from dit_ulysses.cli import main

PLAN = ("plan", "--world", "8", "--heads", "12", "--tokens", "32760", "--guided")
PROBE = ("probe", "--seconds", "0.05", "--output", "costs.json")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def test_a_plan_is_printed_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--layers", "30", "--head_dim", "64", "--kv_heads", "6"]) == 0
    told = capsys.readouterr().out
    assert "12 heads (6 of keys) of 64, 32,760 tokens, 30 layers, batch 1, guided" in told
    assert "ulysses 2 × ring 4" in told


def test_a_plan_as_json_is_that_of_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"] == ParallelPlan.auto(8, heads=12, tokens=32760, guided=True).as_dict()


def test_costs_of_a_file_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = Costs(attention_flops=1e9, measured=("attention_flops",))
    costs.save(tmp_path / "c.json")
    assert main([*PLAN, "--costs", str(tmp_path / "c.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["costs"] == json.loads((tmp_path / "c.json").read_text())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--kv_heads", "5"), "kv_heads is 5"),
        (("--tokens", "0"), "tokens is 0"),
        (("--costs", "none.json"), "none.json cannot be read"),
        (("--memory", "0.001"), "GB are allowed"),
    ],
)
def test_bad_input(more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, *more]) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert not told.out


def test_a_defect_and_an_interruption_have_codes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for raised, code, words in ((ZeroDivisionError, 3, "ZeroDivisionError"), (KeyboardInterrupt, 130, "interrupted")):
        monkeypatch.setattr("dit_ulysses.plan.plans", _raising(raised))
        assert main(PLAN) == code
        assert words in capsys.readouterr().err


def _raising(kind: type[BaseException]) -> object:
    def plans(*arguments: object, **more: object) -> None:
        raise kind

    return plans


def test_a_probe_needs_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe"]) == 2
    assert "torchrun --nproc_per_node=4 -m dit_ulysses probe" in capsys.readouterr().err


def test_a_probe_is_written_once_and_printed_by_one_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dit_ulysses"]
    done = subprocess.run(
        [*command, *PROBE],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("latency_inside") == 1
    assert "what sending between nodes costs stays a guess" in done.stdout
    costs = Costs.load(tmp_path / "costs.json")
    assert str(costs) in done.stdout
    assert costs.ranks_per_node == 2


def probe_again(folder: Path, port: int) -> tuple[int, str, str]:
    """In the job of a store that somebody else holds, as torchrun does."""
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(PROBE)
    return code, out.getvalue(), err.getvalue()


def test_a_file_that_is_there_is_refused_once_by_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text("precious")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    first, second = run_all(2, probe_again, tmp_path, store.port)
    assert (first[0], first[1]) == (2, "")
    assert first[2].count("costs.json exists; name another file, or say --overwrite") == 1
    assert second == (2, "", "")
    assert (tmp_path / "costs.json").read_text() == "precious"


HELP = """
import sys
from dit_ulysses.cli import main
try:
    main({arguments})
finally:
    heavy = sorted({{"torch", "numpy"}} & set(sys.modules))
    assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["probe", "--help"], list(PLAN)])
def test_no_torch_is_imported_where_none_is_needed(arguments: list[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-c", HELP.format(arguments=arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout
