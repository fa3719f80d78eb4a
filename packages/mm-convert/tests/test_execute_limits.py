"""Limits and obstacles of execution: memory that is allowed, the disk, rights, links, mount points."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import files
from safetensors.torch import load_file, save_file
from test_bad_input import SHARD, hf_to_mm, mm_to_hf
from test_streaming import LAYOUT, QWEN, child, save_sparse
from tiny_checkpoint import MakeModel

from mm_convert import Conversion, Layout, Plan, copying
from mm_convert.cli import main
from mm_convert.copying import CHUNK, jobs
from mm_convert.dry_run import forecast
from mm_convert.errors import OutputExistsError, OutputSpaceError, RamCapError
from mm_convert.execution import Target, execute
from mm_convert.memory import buffers, parse_size
from mm_convert.output import new_folder, scratch_of
from mm_convert.plans import Ref, Segment, Spec
from mm_convert.safetensors_file import SafetensorsLayout, read_safetensors

WHOLE = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))


def carried_out(conversion: Conversion, **options: Any) -> None:
    execute(conversion.plan, conversion.files, conversion.target, **options)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512MiB", 536_870_912),
        ("1 GiB", 1_073_741_824),
        ("1.5GB", 1_500_000_000),
        ("64kb", 64_000),
        ("1000000", 1_000_000),
        (1000, 1000),
        ("9007199254740993", 9_007_199_254_740_993),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "0.1", "-1", "MiB", "5 apples", "1e9", "infGB", "nan", "512M iB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size; .*512MiB"):
        parse_size(text)


def test_a_cap_lowers_the_workers_then_refuses(make_model: MakeModel, tmp_path: Path) -> None:
    """Whole rows go through a buffer of 1 MiB, and the next is made while the last is still held."""
    conversion = QWEN.prepare_hf_to_mm(make_model(), tmp_path / "mm", WHOLE)
    for cap, workers in ((None, 3), (100 << 20, 3), (6 << 20, 3), ((6 << 20) - 1, 2), (2 << 20, 1)):
        told = forecast(conversion, workers=3, ram_cap=cap)
        assert told.workers == workers
        assert told.memory_bytes == forecast(conversion, workers=1).memory_bytes + (workers - 1) * (2 << 20)
    for refused in (forecast, carried_out):
        with pytest.raises(RamCapError, match=r"--ram-cap 2097151: too small.* least is --ram-cap 2097152$"):
            refused(conversion, workers=3, ram_cap=(2 << 20) - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_no_more_threads_copy_than_the_cap_allows(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work: set[int] = set()
    real = copying.Copier.run

    def seen(self: copying.Copier, job: copying.Job) -> Any:
        at_work.add(threading.get_ident())
        return real(self, job)

    monkeypatch.setattr(copying.Copier, "run", seen)
    conversion = QWEN.prepare_hf_to_mm(make_model(), tmp_path / "mm", WHOLE)
    carried_out(conversion, workers=4, ram_cap=2 << 20)
    assert len(at_work) == 1
    QWEN.hf_to_mm(tmp_path / "hf", tmp_path / "again", WHOLE)
    assert files(tmp_path / "mm") == files(tmp_path / "again")


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2])
def test_buffers_are_as_large_as_was_said(tp: int, workers: int, tmp_path: Path) -> None:
    """Beside what Python's own allocator counts, both ways; rows wider than a buffer included."""
    layer = "model.layers.0."
    wide: dict[str, tuple[int, ...]] = {f"{layer}mlp.{p}_proj.weight": (800_000, 16) for p in ("gate", "up")}
    wide |= {f"{layer}mlp.down_proj.weight": (16, 800_000), "model.embed_tokens.weight": (800_000, 16)}
    hf, mm = tmp_path / "hf", tmp_path / "mm"
    save_sparse(hf, wide)
    _bounded(QWEN.prepare_hf_to_mm(hf, mm, Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), tp_size=tp)), workers)
    _bounded(QWEN.prepare_mm_to_hf(mm, hf, tmp_path / "back", layout=None), workers)


def _bounded(conversion: Conversion, workers: int) -> None:
    said = buffers(conversion.plan, jobs(conversion.plan, conversion.files), workers=workers)
    tracemalloc.start()
    carried_out(conversion, workers=workers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    beside = CHUNK // 2  # threads, names, headers
    assert said.nbytes // workers // 2 < peak < said.nbytes + beside


@pytest.mark.parametrize("tp", [1, 4])
def test_a_process_takes_no_more_than_the_dry_run_says(tp: int, make_model: MakeModel, tmp_path: Path) -> None:
    """By what the operating system counts, a process of its own with all that the command line loads."""
    hf, mm, back = make_model(), tmp_path / "mm", tmp_path / "back"
    layout = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=tp)
    told = forecast(QWEN.prepare_hf_to_mm(hf, mm, layout), workers=2)
    code, peak, _ = child(hf_to_mm(hf, mm, "[[2,3]]", "[[3,0]]", tp, "--workers", "2"))
    assert code == 0
    assert peak << 20 < told.memory_bytes
    told = forecast(QWEN.prepare_mm_to_hf(mm, hf, back, layout=None), workers=2, ram_cap=2 << 20)
    code, peak, _ = child(mm_to_hf(mm, hf, back, "--workers", "2", "--ram-cap", "2MiB"))
    assert code == 0
    assert peak << 20 < told.memory_bytes


def test_matrices_to_transpose_are_held_whole_and_counted(tmp_path: Path) -> None:
    whole = torch.arange(1000 * 1500, dtype=torch.int32).reshape(1000, 1500)
    save_file({"w": whole}, tmp_path / "x")
    source, refs = Ref("x", "", "w"), [Ref("made", "", name) for name in "ab"]
    plan = Plan.build(
        {source: Spec("I32", (1000, 1500))},
        dict.fromkeys(refs, Spec("I32", (750, 1000))),
        [Segment(source, 750 * n, ref, 0, 750, 0, transposed=True) for n, ref in enumerate(refs)],
    )
    layouts = {"made": SafetensorsLayout.of(plan.targets)}
    target = Target(directory=tmp_path / "out", layouts=layouts, others={}, options={})
    conversion = Conversion(plan=plan, source="x", files={"x": read_safetensors(tmp_path / "x")}, target=target)
    _bounded(conversion, 1)
    held = load_file(tmp_path / "out" / "made")
    assert torch.equal(torch.cat([held["a"], held["b"]]), whole.T)
    # The matrix, and one half made while the other is still held.
    with pytest.raises(RamCapError, match=r"least is --ram-cap 12000000"):
        forecast(conversion, ram_cap=11_999_999)


def forced(monkeypatch: pytest.MonkeyPatch, code: int = 0) -> list[str]:
    """What is forced to the disk, and renamed, in order; with a code, folders can't be forced."""
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if code and path.is_dir():
            raise OSError(code, os.strerror(code))
        events.append(str(path))
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    return events


def test_all_is_on_the_disk_before_the_folder_appears(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, mm = make_model(), tmp_path / "mm"
    events = forced(monkeypatch)
    carried_out(QWEN.prepare_hf_to_mm(hf, mm, LAYOUT), fsync=True)
    renamed = events.index("rename")
    before = {Path(path).relative_to(scratch_of(mm) / "new") for path in events[:renamed]}
    assert before == {path.relative_to(mm) for path in (mm, *mm.rglob("*"))}
    assert events[renamed:] == ["rename", str(tmp_path)]
    events.clear()
    QWEN.hf_to_mm(hf, tmp_path / "other", LAYOUT)
    assert events == ["rename"]


def test_file_systems_that_know_no_forcing_of_folders(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = make_model()
    conversion = QWEN.prepare_hf_to_mm(hf, tmp_path / "mm", LAYOUT)
    with monkeypatch.context() as patch:
        forced(patch, errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            carried_out(conversion, fsync=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    events = forced(monkeypatch, errno.EINVAL)
    carried_out(conversion, fsync=True)
    assert sum(path.endswith(".pt") for path in events) == 4


def refusing(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
    """Nothing can be made in a folder, whoever asks: who runs the tests may be allowed everything."""
    real = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **named: Any) -> None:
        if self.parent == folder:
            raise OSError(code, os.strerror(code), str(self))
        real(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EACCES, "Permission denied"),
        (errno.EROFS, "Read-only file system"),
        (errno.ENOSPC, "No space left on device"),
        (errno.EDQUOT, "quota exceeded"),
    ],
)
def test_a_folder_that_takes_nothing(
    code: int, words: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hf, shelf = make_model(), tmp_path / "shelf"
    shelf.mkdir()
    refusing(monkeypatch, shelf, code)
    assert main(hf_to_mm(hf, shelf / "mm")) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"mm-convert: error: {shelf / 'mm'} can't be ")
    assert words in message
    assert not list(shelf.iterdir())


def test_a_file_where_a_folder_should_be(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_model()
    (tmp_path / "letter").write_text("mine")
    for target in (tmp_path / "letter" / "mm", tmp_path / "letter" / "deep" / "mm"):
        assert main(hf_to_mm(hf, target)) == 2
        assert capsys.readouterr().err.startswith(f"mm-convert: error: {target} can't be made: {tmp_path / 'letter'}")
    assert main(hf_to_mm(hf, tmp_path / "letter")) == 2
    assert (tmp_path / "letter").read_text() == "mine"


def test_a_mount_point(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container's volume, say: empty, and refused by the last rename, hours later."""
    (tmp_path / "volume").mkdir()
    hf, real = make_model(), os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume" or real(path))
    assert main(hf_to_mm(hf, tmp_path / "volume")) == 2
    assert f"{tmp_path / 'volume'} is a mount point" in capsys.readouterr().err
    assert main(hf_to_mm(hf, tmp_path / "volume" / "mm")) == 0


def linked(folder: Path, elsewhere: Path) -> None:
    """As the hub's cache does it: every file a link to a blob of another name."""
    elsewhere.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(elsewhere / f"{number:040x}")
        path.symlink_to(Path("..") / elsewhere.name / f"{number:040x}")


def test_links_are_read_through(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", LAYOUT)
    QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    linked(hf, tmp_path / "blobs")
    (tmp_path / "snapshot").symlink_to(hf, target_is_directory=True)
    assert main(hf_to_mm(tmp_path / "snapshot", tmp_path / "mm2", tp=2)) == 0
    assert files(tmp_path / "mm2") == files(tmp_path / "mm")
    (tmp_path / "mm3").symlink_to(tmp_path / "mm2", target_is_directory=True)
    assert main(mm_to_hf(tmp_path / "mm3", tmp_path / "snapshot", tmp_path / "back2")) == 0
    assert files(tmp_path / "back2") == files(tmp_path / "back")
    assert not any(path.is_symlink() for path in (tmp_path / "back2").iterdir())


@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_a_linked_target_is_made_where_it_points(before: str, make_model: MakeModel, tmp_path: Path) -> None:
    hf, big, link = make_model(), tmp_path / "big", tmp_path / "mm"
    big.mkdir()
    if before == "empty":
        (big / "mm").mkdir()
    if before == "old":
        QWEN.hf_to_mm(hf, big / "mm", WHOLE)
    link.symlink_to("big/mm", target_is_directory=True)
    with new_folder(link, overwrite=True) as scratch:
        assert scratch.parent == big, "it would not fit beside the link"
    shutil.rmtree(big / "mm")
    QWEN.hf_to_mm(hf, link, LAYOUT)
    assert main([*hf_to_mm(hf, link, tp=2), "--overwrite"]) == 0
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "hf", "mm"]
    assert [path.name for path in big.iterdir()] == ["mm"]
    QWEN.hf_to_mm(hf, tmp_path / "plain", LAYOUT)
    assert files(big / "mm") == files(tmp_path / "plain")


def test_links_that_must_not_be_followed(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    before = files(hf)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputExistsError, match=r"loop is a symbolic link that leads nowhere"):
        QWEN.hf_to_mm(hf, tmp_path / "loop", LAYOUT, overwrite=True)
    (tmp_path / "itself").symlink_to(hf, target_is_directory=True)
    with pytest.raises(OutputExistsError, match="which is read, stands in it"):
        QWEN.hf_to_mm(hf, tmp_path / "itself", LAYOUT, overwrite=True)
    assert files(hf) == before


def gone(path: Path) -> None:
    path.unlink()


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def put_in_its_place(path: Path) -> None:
    """Another model of the same shapes, by a rename, as a download does it."""
    data = path.read_bytes()
    other = path.with_suffix(".new")
    other.write_bytes(data[:-64] + bytes(255 - byte for byte in data[-64:]))
    other.replace(path)


@pytest.mark.parametrize("change", [gone, shorter, put_in_its_place])
def test_a_source_that_changes_between_plan_and_execution(
    change: Callable[[Path], None], make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hf = make_model()
    real = Conversion.run

    def late(self: Conversion, **options: Any) -> Any:
        change(hf / SHARD)
        return real(self, **options)

    monkeypatch.setattr(Conversion, "run", late)
    assert main(hf_to_mm(hf, tmp_path / "mm")) == 2
    message = capsys.readouterr().err
    assert str(hf / SHARD) in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_holes_of_an_unfinished_run_are_no_space_that_it_has(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = make_model()
    conversion = QWEN.prepare_hf_to_mm(hf, tmp_path / "mm", LAYOUT)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        with pytest.raises(OSError, match="Input/output error"):
            carried_out(conversion, resume=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 58, 42))
    size = sum(layout.size for layout in conversion.target.layouts.values())
    with pytest.raises(OutputSpaceError, match=f"42 bytes free, the result takes {size:,}"):
        carried_out(conversion, resume=True)
