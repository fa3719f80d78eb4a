"""The scripts of docs/examples, with stand-ins for Slurm's commands, torchrun and mm-finetune."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"

# Two nodes with two tasks each, as srun starts them: each task's number, its number on its node, the number of all.
SRUN = """\
while [ "${1#--}" != "$1" ]; do shift; done
code=0
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@" || code=$?
done
exit $code
"""
SCONTROL = """\
if [ "$1 $2" = "show hostnames" ]; then printf 'node7\\nnode8\\n'; else echo "$@" >> "$CALLS/scontrol"; fi
"""
FINETUNE = """\
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" >> "$CALLS/processes"
exit "$ENDS_WITH"
"""
TORCHRUN = 'printf "%s\\n" "$@" > "$CALLS/torchrun"\n'


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the stand-ins write down how they were called."""
    commands = {"srun": SRUN, "scontrol": SCONTROL, "mm-finetune": FINETUNE, "torchrun": TORCHRUN}
    for name, text in commands.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-8]")
    return tmp_path


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (143, True), (2, False)])
def test_slurm(calls: Path, monkeypatch: pytest.MonkeyPatch, code: int, requeued: bool) -> None:
    monkeypatch.setenv("ENDS_WITH", str(code))
    done = subprocess.run(
        ["bash", EXAMPLES / "train.slurm", "my run.yaml", "train.lr=1e-4"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (code, "")
    expected = [
        f"{rank} {rank % 2} 4 node7 train my run.yaml train.lr=1e-4 output.resume=true" for rank in (0, 1, 2, 3)
    ]
    assert (calls / "processes").read_text().splitlines() == expected
    assert (calls / "scontrol").exists() == requeued
    if requeued:
        assert (calls / "scontrol").read_text() == "requeue 123456\n"


def test_node(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("NNODES", "2")
    subprocess.run(["sh", EXAMPLES / "train-node.sh", "1", "my run.yaml", "train.lr=1e-4"], check=True)
    words = (calls / "torchrun").read_text().splitlines()
    assert words[-5:] == ["-m", "mm_finetune", "train", "my run.yaml", "train.lr=1e-4"]
    assert {"--nnodes=2", "--node_rank=1", "--master_addr=node7"} <= set(words)


def test_node_asks_for_what_is_missing(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("NNODES", "2")
    done = subprocess.run(["sh", EXAMPLES / "train-node.sh", "1", "x.yaml"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "MASTER_ADDR: name of machine 0" in done.stderr
