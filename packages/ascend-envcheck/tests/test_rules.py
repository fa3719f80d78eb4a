"""What single rules say of facts that no whole machine shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ascend_envcheck import Finding, Severity, Snapshot, UnknownRuleError, check
from ascend_envcheck.rules.rule import Rule, npu_count
from ascend_envcheck.snapshot import CommandFacts, Distribution, ImportFacts, PythonFacts

NPU = {"/dev/davinci0": "rw", "/dev/davinci_manager": "rw"}


def only(rule: str, snapshot: Snapshot) -> Finding:
    (finding,) = check(snapshot, only=[rule]).findings
    return finding


def with_distributions(snapshot: Snapshot, **versions: str) -> Snapshot:
    return replace(snapshot, distributions={name: Distribution(version) for name, version in versions.items()})


def test_denied_nodes() -> None:
    finding = only("DEV-NODES", replace(Snapshot(), devices={**NPU, "/dev/davinci0": "denied"}))
    assert finding.severity is Severity.FAIL
    assert "/dev/davinci0" in finding.cause
    assert "HwHiAiUser" in finding.command


def test_npu_smi_that_hangs_or_prints_nothing() -> None:
    hung = replace(Snapshot(), devices=NPU, commands={"npu-smi info": CommandFacts("timeout", "no answer within 10 s")})
    assert "no answer within 10 s" in only("NPU-SMI", hung).cause
    blank = replace(Snapshot(), devices=NPU, commands={"npu-smi info": CommandFacts("ok")})
    assert "no table" in only("NPU-SMI", blank).cause


def test_npus_are_counted_by_nodes_then_table_then_torch() -> None:
    seen = ImportFacts(device="npu", device_count=4)
    assert npu_count(replace(Snapshot(), imports=seen)) == 4
    assert npu_count(replace(Snapshot(), imports=seen, devices=NPU)) == 1
    assert npu_count(replace(Snapshot(), devices={"/dev/davinci_manager": "rw"})) == 0


def test_a_rule_left_out_leaves_its_verdicts_open() -> None:
    snapshot = replace(
        with_distributions(Snapshot(), torch="2.13.0"),
        python=PythonFacts(version="3.11.0"),
        imports=ImportFacts(torch="ok", accelerator_api=True),
    )
    cpu, npu = check(snapshot, profile="train", skip=["MM-PACKAGES", "DEV-NODES"]).verdicts
    assert (cpu.answer, cpu.reasons) == ("not known", ("MM-PACKAGES was left out",))
    assert npu.answer == "not known"
    assert "DEV-NODES was left out" in npu.reasons


def test_a_profile_judges_what_it_is_for() -> None:
    """psutil beside megatron-core matters for training only."""
    snapshot = with_distributions(Snapshot(), **{"megatron-core": "0.16.1"})
    assert any(finding.id == "MM-PSUTIL" for finding in check(snapshot, profile="train").findings)
    assert not any(finding.id == "MM-PSUTIL" for finding in check(snapshot, profile="infer").findings)
    with pytest.raises(ValueError, match="no profile 'both'; there are train, infer, all"):
        check(snapshot, profile="both")


def test_a_rule_that_fails_is_a_finding_of_its_own() -> None:
    def broken(snapshot: Snapshot) -> list[Finding]:
        raise KeyError("a defect of a third party")

    rules = (Rule("THEIRS", "theirs", broken), Rule("OURS", "ours", lambda snapshot: []))
    (finding,) = check(Snapshot(), rules=rules).findings
    assert (finding.id, finding.severity) == ("THEIRS", Severity.WARN)
    assert "a defect of a third party" in finding.cause


def test_a_typo_is_understood() -> None:
    with pytest.raises(UnknownRuleError, match=r"no rule 'TORCH-NPUS', did you mean TORCH-NPU\?.*list"):
        check(Snapshot(), only=["TORCH-NPUS"])
    with pytest.raises(UnknownRuleError, match=r"no rule '§'; `ascend-envcheck list`"):
        check(Snapshot(), skip=["§"])
    with pytest.raises(UnknownRuleError, match="leave no rule"):
        check(Snapshot(), only=["PY-VER"], skip=["PY-VER"])
