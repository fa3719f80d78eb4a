import io
import json
from pathlib import Path

from mm_finetune.progress import RunLog


def test_every_step_is_written_and_the_last_is_shown(tmp_path: Path) -> None:
    console = io.StringIO()
    log = RunLog(tmp_path / "metrics.jsonl", steps=3, samples=8, console=console)
    for step in (1, 2, 3):
        log.step(step, loss=1.5, lr=1e-3, grad_norm=0.5, tokens=100)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["eta_s"] == 0
    assert rows[0]["tokens_per_second"] > rows[0]["samples_per_second"] > 0
    lines = console.getvalue().splitlines()
    assert lines[0].startswith("step 1/3  loss 1.5000  lr 1.00e-03  grad norm 0.500")
    assert lines[-1].startswith("step 3/3")
    assert lines[-1].endswith("ETA 0:00")


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    console = io.StringIO()
    log = RunLog(None, steps=1, samples=1, console=console)
    assert log.step(1, loss=0.0, lr=0.0, grad_norm=0.0, tokens=1).step == 1
    log.close()
    assert console.getvalue() == ""
