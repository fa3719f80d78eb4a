"""What the rules on packages say of facts that no whole machine shows; the tables of versions, row by row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ascend_envcheck import Finding, Severity, Snapshot, check
from ascend_envcheck.messages import CHINESE, told
from ascend_envcheck.probes.place import Place
from ascend_envcheck.probes.python import DISTRIBUTIONS, look
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.rules.packages import _MM_FINETUNE, _WAN_INFER, Need
from ascend_envcheck.snapshot import Distribution
from ascend_envcheck.tables import find_torch_npu, known_canns, records, torch_npu_rows
from ascend_envcheck.versions import cann_order, cann_version, release

NPU = {"/dev/davinci0": "rw", "/dev/davinci_manager": "rw"}
HOME = "/usr/local/Ascend/ascend-toolkit/latest"
CONFIDENCE = {"official", "official-history", "secondary", "tested-list", "derived", "inferred"}
TABLES = (
    *("torch_npu", "torchvision", "cross", "lifecycle", "mindspeed_mm", "mindie_sd", "vllm_ascend"),
    *("triton_ascend", "ops_toolkit", "cann_packages"),
)
_NAMES = {"torch_npu": "torch_npu"}  # every other one is written with hyphens
PACKAGES = Path(__file__).parents[2]


def all_of(rule: str, snapshot: Snapshot) -> list[Finding]:
    return list(check(snapshot, only=[rule]).findings)


def only(rule: str, snapshot: Snapshot) -> Finding:
    (finding,) = all_of(rule, snapshot)
    return finding


def having(**versions: str) -> Snapshot:
    found = {_NAMES.get(name, name.replace("_", "-")): Distribution(version) for name, version in versions.items()}
    return replace(Snapshot(), devices=NPU, distributions=found)


@pytest.mark.parametrize(("package", "needs"), [("mm-finetune", _MM_FINETUNE), ("wan-infer", _WAN_INFER)])
def test_the_needs_are_those_that_the_packages_declare(package: str, needs: tuple[Need, ...]) -> None:
    declared = (PACKAGES / package / "pyproject.toml").read_text().split("dependencies = [", 1)[1].split("]", 1)[0]
    lines = [line.strip().strip('",') for line in declared.splitlines()]
    bounds = {line.split(">=")[0]: line.split(">=")[1].split(",<") for line in lines if ">=" in line}
    told = {need.name: need for need in needs}
    assert set(told) == set(bounds) - {"torch", "psutil"}  # which have rules of their own
    for name, need in told.items():
        low, *high = bounds[name]
        assert need.first == release(low if "." in low else low + ".0")
        assert [need.beyond] == ([release(high[0] if "." in high[0] else high[0] + ".0")] if high else [None])


@pytest.mark.parametrize(
    ("version", "words"), [("4.57.0", "needed is transformers>=5.0,<6.0"), ("6.1.0", "is 6.1.0"), ("5.3.0", "")]
)
def test_a_version_outside_of_the_bounds(version: str, words: str) -> None:
    cause = only("MM-PACKAGES", having(transformers=version)).cause
    assert words in cause
    assert ("transformers" in cause) == bool(words)


def test_what_is_missing_is_listed_and_not_told_one_by_one() -> None:
    few = having(transformers="4.57.0", megatron_core="0.16.0", numpy="2.0.0", pillow="11.0.0", pyyaml="6.0.2")
    cause = only("MM-PACKAGES", few).cause
    assert "safetensors, tqdm, zlib-ng are not installed; transformers is 4.57.0" in cause
    assert "未安装 safetensors、tqdm、zlib-ng；transformers 为 4.57.0" in told(cause, CHINESE)


def test_the_pins_of_others_speak_where_they_are_installed() -> None:
    assert only("PKG-PIN", having(diffusers="0.33.0")).severity is Severity.SKIP
    finding = only("PKG-PIN", having(mindiesd="3.0.0", diffusers="0.33.0", numpy="1.26.4"))
    assert finding.severity is Severity.WARN
    assert "diffusers 0.29.0 (here 0.33.0)" in finding.cause
    assert "numpy" not in finding.cause
    assert "diffusers==0.29.0" in finding.command
    assert only("PKG-PIN", having(mindiesd="77.0")).severity is Severity.SKIP
    assert only("PKG-PIN", having(mindiesd="3.0.0", diffusers="0.29.0")).severity is Severity.INFO


@pytest.mark.parametrize(
    ("mm", "torch_npu", "cann", "words"),
    [
        ("26.1.0", "2.7.1.post8", "9.1.0", ""),
        ("26.1.0", "2.7.1.post2", "8.5.0", ""),  # TorchNPU 7.3.0 and CANN 8.5.0 are in its list
        (
            "26.1.0",
            "2.7.1",
            "8.3.RC1",
            "TorchNPU 7.3.0 / 26.0.0 / 26.1.0 (here 7.2.0)",
        ),  # which its release notes exclude
        ("26.0.0", "2.7.1.post8", "9.0.0", "TorchNPU 7.2.0 / 7.3.0 / 26.0.0 (here 26.1.0)"),
        ("26.0.0", "2.7.1.post4", "9.1.0", "CANN 8.3.RC1 / 8.5.0 / 9.0.0 (here 9.1.0)"),
        ("2.0.0", "2.1.0.post12", "8.1.RC1", ""),
    ],
)
def test_the_versions_of_mindspeed_mm(mm: str, torch_npu: str, cann: str, words: str) -> None:
    row = find_torch_npu(torch_npu)
    assert row is not None
    snapshot = replace(
        having(mindspeed_mm=mm, torch=row.torch, torch_npu=torch_npu),
        cann_homes=(HOME,),
        files={f"{HOME}/runtime/version.info": f"version_dir={cann}\n"},
    )
    finding = only("PKG-PIN", snapshot)
    assert finding.severity is (Severity.WARN if words else Severity.INFO)
    assert words in finding.cause


def test_a_label_of_a_build_is_of_no_account() -> None:
    """vllm-ascend 0.18.0 names torch_npu 2.9.0.post1+git4c901a4."""
    assert only("PKG-PIN", having(vllm_ascend="0.18.0", torch_npu="2.9.0.post1")).severity is Severity.INFO
    assert "2.9.0.post1" in only("PKG-PIN", having(vllm_ascend="0.18.0", torch_npu="2.9.0")).cause


def test_packages_for_cuda_are_told_one_by_one() -> None:
    snapshot = having(flash_attn="2.7", xformers="0.0.30", megatron_core="0.16.1")
    snapshot = replace(
        snapshot, distributions={name.replace("_", "-"): v for name, v in snapshot.distributions.items()}
    )
    assert [finding.severity for finding in all_of("NO-CUDA-ONLY", snapshot)] == [Severity.WARN, Severity.WARN]
    assert only("NO-CUDA-ONLY", replace(snapshot, devices={})).severity is Severity.SKIP


def test_no_clone_no_word() -> None:
    for rule in ("MM-MEGATRON", "MM-MINDSPEED", "MM-DEPS"):
        assert only(rule, having(torch="2.13.0")).severity is Severity.SKIP


def test_an_installed_mindspeed_mm_without_any_megatron() -> None:
    finding = only("MM-MEGATRON", having(mindspeed_mm="26.1.0"))
    assert (finding.severity, finding.blocks, finding.tasks) == (Severity.FAIL, ("npu",), ("train",))
    assert "core_v0.12.1" in finding.command


def test_a_linked_clone_is_looked_into(tmp_path: Path) -> None:
    """``pip install -e`` leaves the folder of the clone in direct_url.json."""
    clone, site = tmp_path / "MindSpeed-MM", tmp_path / "site"
    (clone / "mindspeed_mm").mkdir(parents=True)
    (clone / "megatron" / "core").mkdir(parents=True)
    (clone / "megatron" / "core" / "package_info.py").write_text("MAJOR = 0\nMINOR = 12\nPATCH = 1\n")
    metadata = site / "mindspeed_mm-26.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mindspeed-mm\nVersion: 26.1.0\n")
    (metadata / "direct_url.json").write_text(json.dumps({"url": f"file://{clone}", "dir_info": {"editable": True}}))
    place = Place(Tree(str(tmp_path)), {"PATH": "/bin"}, [str(site)], False, 10, 10)
    facts = look(place)
    assert f"{clone}/mindspeed_mm" in facts["paths"]
    snapshot = replace(Snapshot(), **facts)
    assert only("MM-MEGATRON", snapshot).cause == "Megatron is core 0.12.1"


def test_what_a_rule_asks_about_is_written_down() -> None:
    asked = {need.name for need in (*_MM_FINETUNE, *_WAN_INFER)}
    asked |= {row["package"] for row in records("cann_packages")}
    assert asked <= set(DISTRIBUTIONS)


@pytest.mark.parametrize("table", TABLES)
def test_every_row_has_a_source_and_a_known_confidence(table: str) -> None:
    rows = records(table)
    assert rows
    for row in rows:
        assert row["confidence"] in CONFIDENCE
        assert len(row["source"]) > len("README")
        assert all(value == value.strip() for value in row.values())


@pytest.mark.parametrize("table", TABLES)
def test_every_version_of_a_row_parses(table: str) -> None:
    for row in records(table):
        for name, value in row.items():
            for version in value.split() if name in ("torch", "torch_npu", "megatron_core", "triton_ascend") else ():
                assert release(version), (table, name, value)
            for version in value.split() if name in ("cann", "toolkit", "ops") else ():
                assert cann_version(version) == version, (table, name, value)


def test_no_row_is_there_twice() -> None:
    for table in TABLES:
        rows = [tuple(value for name, value in row.items() if name != "source") for row in records(table)]
        assert len(rows) == len(set(rows)), table


def test_the_canns_have_one_order() -> None:
    known = sorted(known_canns(), key=cann_order)
    assert len({cann_order(cann) for cann in known}) == len(known)
    # The order in which the vendor released them.
    released = ["7.0.0", "8.0.RC1", "8.0.RC2", "8.0.RC3", "8.0.0", "8.1.RC1", "8.2.RC1", "8.3.RC1", "8.3.RC2"]
    released += ["8.5.0", "8.5.1", "8.5.2", "9.0.0", "9.0.1", "9.1.0"]
    assert [cann for cann in known if cann in released] == released
    assert cann_order("8.3.RC1.alpha003") < cann_order("8.3.RC1")
    assert cann_order("9.0.0.beta1") < cann_order("9.0.0")


def test_each_train_has_one_cann() -> None:
    """Trains whose number the vendor printed; each torch_npu of one was made for the same CANN."""
    found: dict[str, set[str]] = {}
    for row in torch_npu_rows():
        if row.release and row.cann:
            found.setdefault(row.release, set()).add(row.cann)
    assert {train: canns for train, canns in found.items() if len(canns) > 1} == {}


def test_the_tables_of_others_agree_with_the_one_of_torch_npu() -> None:
    """Where vllm-ascend names a torch_npu that is in the table, it is one for the torch that it names."""
    for row in records("vllm_ascend"):
        found = find_torch_npu(row["torch_npu"])
        assert found is None or found.torch == row["torch"], row
    trains = {row.release for row in torch_npu_rows()}
    for row in records("mindspeed_mm"):
        assert set(row["torch_npu_release"].split()) <= trains
        assert set(row["cann"].split()) <= known_canns()
