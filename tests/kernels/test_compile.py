"""The kernels are legal for the compiler too, which knows more of types than the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = ("_norm_kernel", "_rotate_kernel", "_multiply_add_kernel")


def test_every_kernel_compiles_for_two_generations(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiling.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    assert compiled == {(kernel, generation) for kernel in KERNELS for generation in ("80", "90")}
