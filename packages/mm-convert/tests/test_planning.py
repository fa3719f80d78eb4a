"""The three directions without a converter's name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from recorded_models import Recorded
from test_resplit import weights

from mm_convert import Converter, Layout, LayoutError, execute, plan, verify

ONE = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))
TWO = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2)


def test_what_is_given_tells_the_direction(tmp_path: Path) -> None:
    hf = Recorded.named("qwen2_5_vl").write(tmp_path / "hf")
    planned = plan(hf, tmp_path / "one", ONE)
    assert not (tmp_path / "one").exists()
    execute(planned, workers=1)
    execute(plan(tmp_path / "one", tmp_path / "two", TWO, hf_dir=hf))
    execute(plan(tmp_path / "two", tmp_path / "back", hf_dir=hf))
    Converter.named("Qwen2_5_VLConverter").hf_to_mm(hf, tmp_path / "expected", TWO)
    assert weights(tmp_path / "two") == weights(tmp_path / "expected")
    assert verify(hf, tmp_path / "back", full=True).same
    with pytest.raises(LayoutError, match="give a layout to cut it anew, or hf_dir to go back"):
        plan(tmp_path / "one", tmp_path / "x")
    with pytest.raises(LayoutError, match="give the layout to cut it into"):
        plan(hf, tmp_path / "x")


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    hf = Recorded.named("qwen3").write(tmp_path / "hf")
    script = (
        "import sys\nfrom mm_convert import Layout, inspect, plan\n"
        f"plan({str(hf)!r}, {str(tmp_path / 'mm')!r}, Layout(llm_pp_layers=[[2, 3]]))\ninspect({str(hf)!r})\n"
        "sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
