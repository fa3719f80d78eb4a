"""Execution: bounded memory, no torch, the same bytes always, and a folder that is finished or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pty
import resource
import shutil
import struct
import subprocess
import sys
import termios
import zlib
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import files
from safetensors.torch import load_file, save_file
from test_bad_input import hf_to_mm, mm_to_hf
from tiny_checkpoint import MakeModel, config, tensors

from mm_convert import CheckpointError, Converter, ConvertError, Layout, OutputExistsError, Plan, copying, execution
from mm_convert.cli import main
from mm_convert.output import new_folder, scratch_of
from mm_convert.plans import Ref, Segment, Spec
from mm_convert.safetensors_file import SafetensorsLayout, read_safetensors
from mm_convert.stored import StoredFile

QWEN = Converter.named("Qwen2_5_VLConverter")
LAYOUT = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2)
HERE = Path(__file__).parent
# What a child says of itself: the peak of its memory (a new process's, unlike ru_maxrss), and what it imported.
CHILD = """
import sys
import zlib
from mm_convert.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = sorted({"torch", "numpy", "safetensors", "transformers"} & sys.modules.keys())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(code, int(peak) >> 10, *heavy, file=sys.stderr)
"""


def child(arguments: list[str]) -> tuple[int, int, list[str]]:
    """Exit code, peak memory in MiB, and heavy modules of a run of its own."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD, *arguments], capture_output=True, text=True)
    code, peak, *heavy = done.stderr.splitlines()[-1].split()
    return int(code), int(peak), heavy


def save_sparse(directory: Path, wide: dict[str, tuple[int, ...]]) -> int:
    """A model whose shapes are those of the tiny one but for some, and whose bytes are one hole; its size."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(tied=True).items()} | wide
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config(tied=True, nested=False)))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return end


def test_memory_does_not_grow_with_the_model_and_torch_stays_out(tmp_path: Path) -> None:
    rows = 6_000_000
    layer = "model.layers.0.mlp."
    wide: dict[str, tuple[int, ...]] = {f"{layer}{p}_proj.weight": (rows // 4, 16) for p in ("gate", "up")}
    wide |= {f"{layer}down_proj.weight": (16, rows // 4), "model.embed_tokens.weight": (rows, 16)}
    assert save_sparse(tmp_path / "hf", wide) > 300 << 20
    there = hf_to_mm(tmp_path / "hf", tmp_path / "mm", "[[5]]", "[[3]]", 2)
    back = mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "back")
    for arguments in (there, back):
        code, peak, heavy = child(arguments)
        assert (code, heavy) == (0, [])
        assert peak < 100
    shutil.rmtree(tmp_path / "mm")
    shutil.rmtree(tmp_path / "back")


def test_help_imports_nothing_heavy() -> None:
    for words in (["--help"], ["Qwen2_5_VLConverter", "hf_to_mm", "--help"]):
        code, _, heavy = child(words)
        assert (code, heavy) == (0, [])


@pytest.fixture
def killed(tmp_path: Path) -> Callable[[Path, int], subprocess.CompletedProcess[str]]:
    def run(hf: Path, moments: int) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-W", "ignore", str(HERE / "killed_runs.py"), str(hf), str(tmp_path), str(moments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=100)

    return run


def test_killed_at_any_moment_and_resumed(
    make_model: MakeModel, killed: Callable[[Path, int], subprocess.CompletedProcess[str]]
) -> None:
    done = killed(make_model(), 20)
    assert done.returncode == 0, done.stderr


def test_same_input_same_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "a", LAYOUT, workers=1)
    shutil.copytree(hf, tmp_path / "elsewhere" / "hf")
    QWEN.hf_to_mm(tmp_path / "elsewhere" / "hf", tmp_path / "b", LAYOUT, workers=4)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    QWEN.mm_to_hf(tmp_path / "a", hf, tmp_path / "c", workers=1)
    QWEN.mm_to_hf(tmp_path / "b", hf, tmp_path / "d", workers=4)
    assert files(tmp_path / "c") == files(tmp_path / "d")
    shards = [path.name for path in hf.glob("*.safetensors")]
    assert shards
    for name in shards:
        assert (tmp_path / "c" / name).read_bytes() == (hf / name).read_bytes(), "the very file that was read"


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_any_buffer_size_gives_the_same(
    chunk: int, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "a", LAYOUT)
    monkeypatch.setattr(copying, "CHUNK", chunk)
    QWEN.hf_to_mm(hf, tmp_path / "b", LAYOUT)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    QWEN.mm_to_hf(tmp_path / "b", hf, tmp_path / "back")
    for path in hf.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("tp", [1, 4])
def test_rows_that_several_ranks_share_are_read_once(
    tp: int, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, count, real = make_model(), [0], copying.read_scattered

    def counted(descriptor: int, parts: Sequence[memoryview], offset: int) -> None:
        count[0] += sum(map(len, parts))
        real(descriptor, parts, offset)

    monkeypatch.setattr(copying, "read_scattered", counted)
    layout = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), tp_size=tp)
    plan = QWEN.hf_to_mm(hf, tmp_path / "mm", layout, workers=1)
    assert count == [plan.nbytes]


BOXES = [(4, 6, 2), (1, 6, 4), (2, 2, 2), (0, 4, 2), (2, 2, 0), (6, 4, 8), (3, 2, 5)]


@pytest.mark.parametrize(("shape", "dim"), [(s, d) for s in BOXES for d in range(3) if s[d] % 2 == 0])
def test_cuts_along_any_dimension(shape: tuple[int, ...], dim: int, tmp_path: Path) -> None:
    """Halves of one tensor, put into two files the other way round, beside torch's own."""
    whole = torch.randint(0, 256, shape, dtype=torch.uint8)
    save_file({"w": whole}, tmp_path / "x")
    source, half = Ref("x", "", "w"), shape[dim] // 2
    cut = tuple(half if d == dim else size for d, size in enumerate(shape))
    refs = [Ref(file, "", "h") for file in "ab"]
    plan = Plan.build(
        {source: Spec("U8", shape)},
        {ref: Spec("U8", cut) for ref in refs},
        [Segment(source, start, ref, 0, half, dim) for ref, start in zip(refs, (half, 0), strict=True)],
    )
    target = execution.Target(
        directory=tmp_path / "out",
        layouts={ref.file: SafetensorsLayout.of({ref: plan.targets[ref]}) for ref in refs},
        others={},
        options={},
    )
    execution.execute(plan, {"x": read_safetensors(tmp_path / "x")}, target)
    for file, start in (("a", half), ("b", 0)):
        assert torch.equal(load_file(tmp_path / "out" / file)["h"], whole.narrow(dim, start, half))


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def other_names(path: Path) -> None:
    """The header changes, size and time do not."""
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [touched, longer, other_names])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_source_that_changes_after_the_plan(
    change: Callable[[Path], None], when: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = make_model()
    changed: list[bool] = []
    owner, name = (StoredFile, "check_unchanged") if when == "before" else (copying.Copier, "run")
    real = getattr(owner, name)

    def meddled(*arguments: Any) -> Any:
        if not changed:
            changed.append(True)
            change(hf / "model-00002-of-00002.safetensors")
        return real(*arguments)

    monkeypatch.setattr(owner, name, meddled)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors changed while it was converted"):
        QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def failing_writes(monkeypatch: pytest.MonkeyPatch, after: int, code: int = errno.ENOSPC) -> None:
    real, calls = os.pwrite, iter(range(1 << 30))

    def pwrite(*arguments: Any) -> int:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("after", [0, 1, 50, 150])
def test_a_disk_that_fills_up(
    after: int, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hf = make_model()
    failing_writes(monkeypatch, after)
    assert main(hf_to_mm(hf, tmp_path / "mm", tp=2)) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "mm") in message
    assert "No space left" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_limit_on_file_sizes(make_model: MakeModel, tmp_path: Path) -> None:
    """A real one, of the operating system."""
    hf = make_model()
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n{CHILD}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *hf_to_mm(hf, tmp_path / "mm")], capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1].split()[0] == "2"
    assert "File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5000


def test_too_little_space_is_said_before_a_byte_is_written(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 58, 42))
    with pytest.raises(ConvertError, match=r"42 bytes free, the result takes [\d,]+"):
        QWEN.hf_to_mm(make_model(), tmp_path / "mm", LAYOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.fixture
def broken_off(make_model: MakeModel, tmp_path: Path) -> Path:
    """A model whose conversion to ``mm`` ended half way, and could be kept."""
    hf = make_model()
    with pytest.MonkeyPatch.context() as patch:
        failing_writes(patch, 60)
        with pytest.raises(OSError, match="No space"):
            QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT, resume=True, workers=1)
    assert not (tmp_path / "mm").exists()
    return hf


def jobs_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    run: list[Any] = []
    real = copying.Copier.run

    def counted(self: copying.Copier, job: copying.Job) -> dict[Ref, int]:
        run.append(job)
        return real(self, job)

    monkeypatch.setattr(copying.Copier, "run", counted)
    return run


def test_resume_does_only_the_rest(broken_off: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [line for line in (scratch_of(tmp_path / "mm") / "journal").read_text().splitlines()[1:] if line]
    assert kept
    run = jobs_run(monkeypatch)
    QWEN.hf_to_mm(broken_off, tmp_path / "mm", LAYOUT, resume=True)
    rest = len(run)
    QWEN.hf_to_mm(broken_off, tmp_path / "whole", LAYOUT)
    assert rest == len(run) - rest - len(kept)
    assert files(tmp_path / "mm") == files(tmp_path / "whole")


def test_resume_makes_again_what_was_damaged(broken_off: Path, tmp_path: Path) -> None:
    for path in scratch_of(tmp_path / "mm").rglob("*.pt"):
        size = path.stat().st_size
        path.write_bytes(b"\1" * size)
    QWEN.hf_to_mm(broken_off, tmp_path / "mm", LAYOUT, resume=True)
    QWEN.hf_to_mm(broken_off, tmp_path / "whole", LAYOUT)
    differing = [
        n
        for n, data in files(tmp_path / "whole").items()
        if not n.endswith(".pt") and files(tmp_path / "mm")[n] != data
    ]
    assert not differing
    QWEN.mm_to_hf(tmp_path / "mm", broken_off, tmp_path / "back")
    for path in broken_off.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_resume_of_something_else_is_refused(broken_off: Path, tmp_path: Path) -> None:
    other = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))
    with pytest.raises(OutputExistsError, match=r"left by another conversion .*without --resume"):
        QWEN.hf_to_mm(broken_off, tmp_path / "mm", other, resume=True)
    os.utime(broken_off / "model-00001-of-00002.safetensors", ns=(1, 1))
    with pytest.raises(OutputExistsError, match="sources changed since"):
        QWEN.hf_to_mm(broken_off, tmp_path / "mm", LAYOUT, resume=True)
    QWEN.hf_to_mm(broken_off, tmp_path / "mm", other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mm"]


def test_resume_of_a_finished_folder_does_nothing(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT)
    run = jobs_run(monkeypatch)
    QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT, resume=True)
    assert not run
    other = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))
    with pytest.raises(OutputExistsError, match="not empty"):
        QWEN.hf_to_mm(hf, tmp_path / "mm", other, resume=True)
    shutil.copy(hf / "model-00001-of-00002.safetensors", tmp_path / "copy")
    (tmp_path / "copy").replace(hf / "model-00001-of-00002.safetensors")
    with pytest.raises(OutputExistsError, match="not empty"):
        QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT, resume=True)
    QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT, resume=True, overwrite=True)
    assert run


def test_a_second_process_is_kept_out(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    with new_folder(tmp_path / "mm", overwrite=False) as scratch:
        with pytest.raises(OutputExistsError, match="another process is writing"):
            QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT)
        (scratch / "new" / "mine").write_text("kept")
    assert (tmp_path / "mm" / "mine").read_text() == "kept"


def test_a_replacement_broken_off_between_its_renames_gives_the_old_folder_back(
    make_model: MakeModel, tmp_path: Path
) -> None:
    hf, mm = make_model(), tmp_path / "mm"
    QWEN.hf_to_mm(hf, mm, LAYOUT)
    before = files(mm)
    scratch_of(mm).mkdir()
    mm.rename(scratch_of(mm) / "old")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        QWEN.hf_to_mm(hf, mm, LAYOUT)
    assert files(mm) == before
    assert not scratch_of(mm).exists()


def test_the_manifest_names_sources_and_digests(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT)
    manifest = json.loads((tmp_path / "mm" / "manifest.json").read_text())
    assert manifest["options"] == {"command": "hf_to_mm", "layout": str(LAYOUT)}
    assert manifest["sources"].keys() == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    path = "release/mp_rank_00_000/model_optim_rng.pt"
    held = torch.load(tmp_path / "mm" / path, weights_only=True)["model"]
    listed = manifest["outputs"][path]
    assert listed["size"] == (tmp_path / "mm" / path).stat().st_size
    expected = {f"model/{name}": f"{zlib.crc32(t.numpy().tobytes()):08x}" for name, t in held.items()}
    assert listed["crc32"] == expected


def test_progress_is_shown_on_a_terminal_only(make_model: MakeModel, tmp_path: Path) -> None:
    line = [sys.executable, "-W", "ignore", "-m", "mm_convert", *hf_to_mm(make_model(), tmp_path / "mm")]
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    subprocess.run(line, stdout=subprocess.DEVNULL, stderr=inside, check=True)
    os.close(inside)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody holds the other end any more
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert b"100%" in shown
    assert b"B/s" in shown
    shutil.rmtree(tmp_path / "mm")
    assert subprocess.run(line, capture_output=True, check=True).stderr == b""


def test_resume_knows_another_model_of_the_same_shapes(make_model: MakeModel, tmp_path: Path) -> None:
    """Its files are older than the finished folder, and all their headers are the same."""
    hf = make_model()
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    for path in other.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-64:] = bytes(255 - byte for byte in data[-64:])
        path.write_bytes(data)
    QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT)
    with pytest.raises(OutputExistsError, match="not empty"):
        QWEN.hf_to_mm(other, tmp_path / "mm", LAYOUT, resume=True)
