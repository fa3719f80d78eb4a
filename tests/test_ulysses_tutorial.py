"""The page that makes a reader's block sequence parallel: what it shows runs, and is exact."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "one-block-many-ranks.md"
RANKS = 4
ROUNDING = 2e-6  # of float32, in products of other sizes


def test_the_script_of_the_page_runs_and_is_exact(tmp_path: Path) -> None:
    script = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len([line for line in script.splitlines() if line]) <= 40
    (tmp_path / "block.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", "block.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"rank (\d): (\d+) tokens, off by ([\d.e+-]+)", done.stdout)
    assert {(int(rank), int(tokens)) for rank, tokens, _ in said} == {(0, 251), (1, 250), (2, 250), (3, 250)}
    assert all(float(off) <= ROUNDING for *_, off in said), said
