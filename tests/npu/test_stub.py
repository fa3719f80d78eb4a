"""The stub: torch_npu imports on it, with the vendor's schemas and shape functions; and how it is built."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode

from npu import stub_cann
from npu.fake_npu import shapes


def test_the_wheel_is_the_one_for_this_torch_and_sees_one_device() -> None:
    assert torch_npu.__version__.split("+")[0].split(".")[:2] == torch.__version__.split("+")[0].split(".")[:2]
    assert torch_npu.npu.is_available()
    assert torch_npu.npu.device_count() == 1


def test_the_schemas_are_the_vendors() -> None:
    schema = torch.ops.npu.npu_fusion_attention.default._schema
    assert [each.name for each in schema.arguments][:5] == ["query", "key", "value", "head_num", "input_layout"]
    assert len(schema.returns) == 7


@pytest.mark.parametrize("needs_grad", [False, True])
def test_fake_tensors_flow_through_the_vendors_shape_functions(needs_grad: bool) -> None:
    bf16 = torch.bfloat16
    with FakeTensorMode():
        q = torch.empty(2, 4, 300, 64, dtype=bf16, device="npu:0", requires_grad=needs_grad)
        k = torch.empty(2, 2, 200, 64, dtype=bf16, device="npu:0", requires_grad=needs_grad)
        table = torch.empty(1, 1, 300, 64, dtype=bf16, device="npu:0")
        out, greatest, *_ = torch.ops.npu.npu_fusion_attention(q, k, k, 4, "BNSD")
        normed, rstd = torch.ops.npu.npu_rms_norm(torch.ops.npu.npu_rotary_mul(q, table, table), table[0, 0, 0])
        assert shapes((out, normed)) == (((2, 4, 300, 64), bf16),) * 2
        assert shapes((greatest, rstd)) == (((2, 4, 300, 8), torch.float32), ((2, 4, 300, 1), torch.float32))
        assert out.device == torch.device("npu:0")
        if needs_grad:
            grads = torch.autograd.grad((out, normed), (q, k), (torch.empty_like(out), torch.empty_like(normed)))
            assert shapes(grads) == shapes((q, k))


def test_what_the_shape_functions_do_not_see() -> None:
    """The reason for the tables of constraints: a layout that does not exist is no error here."""
    with FakeTensorMode():
        q = torch.empty(1, 8, 256, 64, device="npu:0", dtype=torch.bfloat16)
        assert shapes(torch.ops.npu.npu_fusion_attention(q, q, q, 8, "XXXX")[0]) == shapes(q)


def test_names_are_seen() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 8, 256, 64, device="npu:0", dtype=torch.bfloat16)
        with pytest.raises(AttributeError):
            torch.ops.npu.npu_fusion_atention  # noqa: B018
        with pytest.raises(RuntimeError, match="pre_tokens"):
            torch.ops.npu.npu_fusion_attention(q, q, q, 8, "BNSD", pre_tokens=1)


@pytest.fixture
def _small_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """One library of one function; the whole plan takes seconds, and the environment of these tests came from it."""
    monkeypatch.setattr(stub_cann, "plan", lambda vendor, provided: (["libsmall.so"], "int small() { return 0; }"))


@pytest.mark.usefixtures("_small_plan")
def test_a_second_build_finds_the_first(tmp_path: Path) -> None:
    folder = stub_cann.build(tmp_path)
    library = folder / "libsmall.so"
    made = library.stat().st_mtime_ns
    assert stub_cann.build(tmp_path) == folder
    assert library.stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_environment_keeps_what_was_on_the_loaders_path(tmp_path: Path) -> None:
    found = stub_cann.environment(tmp_path, {"LD_LIBRARY_PATH": "/somewhere"})
    assert found == {"LD_LIBRARY_PATH": f"{tmp_path}{os.pathsep}/somewhere", "ASCEND_OPP_PATH": f"{tmp_path / 'opp'}"}
    assert stub_cann.environment(tmp_path, {})["LD_LIBRARY_PATH"] == str(tmp_path)


@pytest.mark.parametrize("tool", stub_cann.TOOLS)
def test_a_missing_tool_is_named(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in set(stub_cann.TOOLS) - {tool}:
        (tmp_path / other).write_text("#!/bin/sh\n")
        (tmp_path / other).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stub_cann.main([]) == 2
    assert f"not on PATH: {tool}. Install" in capsys.readouterr().err


@pytest.mark.usefixtures("_small_plan")
def test_a_compiler_that_refuses_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub_cann, "plan", lambda vendor, provided: (["libsmall.so"], "no C at all"))
    with pytest.raises(stub_cann.StubError, match=r"gcc .* ended with 1: .*error"):
        stub_cann.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(stub_cann.StubError, match=r"torch is not installed for .*Install torch and the torch_npu"):
        stub_cann.build()


@pytest.mark.usefixtures("_small_plan")
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stub_cann, "_compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stub_cann.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_finds_missing_libraries_and_functions(tmp_path: Path) -> None:
    """A library that calls one function by linking and one by its name, beside one that defines a third."""
    (tmp_path / "absent.c").write_text("int aclAbsent(void) { return 1; }")
    (tmp_path / "beside.c").write_text("int beside(void) { return 1; }")
    (tmp_path / "vendor.c").write_text(
        'int aclAbsent(void); int beside(void); const char *name = "HcclByName";\n'
        "int vendor(void) { return aclAbsent() + beside(); }"
    )
    gcc = ["gcc", "-shared", "-fPIC", f"-L{tmp_path}"]
    for name, links in (("absent", []), ("beside", []), ("vendor", ["-labsent", "-lbeside"])):
        library = tmp_path / f"lib{name}.so"
        command = [*gcc, str(tmp_path / f"{name}.c"), *links, f"-Wl,-soname,{library.name}", "-o", str(library)]
        subprocess.run(command, check=True)
    names, source = stub_cann.plan([tmp_path / "libvendor.so"], [tmp_path / "libbeside.so"])
    assert names == ["libabsent.so"]
    assert "long long aclAbsent() { return 0; }" in source
    assert "long long HcclByName() { return 0; }" in source
    assert "beside" not in source
