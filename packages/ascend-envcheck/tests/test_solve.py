"""Sets of versions that fit together: what the vendor prints, and laws over all rows."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from version_tables import BUILDS, BY_BUILD, CANNS, HDK, MM, PYTHONS, drivers, pairs, runs_on, takes, two_numbers

from ascend_envcheck.compat.asked import LABELS, asked, known
from ascend_envcheck.compat.conflict import legal
from ascend_envcheck.compat.install import operators, set_env
from ascend_envcheck.compat.solver import Solution, solve
from ascend_envcheck.errors import VersionError
from ascend_envcheck.messages import Message, told

TORCHES = sorted({row["torch"] for row in BUILDS})
SURE = ("official", "official-history", "secondary", "tested-list", "derived", "inferred")
RELEASED = ("general", "patch", "pre-release", "unlisted")

FIXED = st.fixed_dictionaries(
    {},
    optional={
        "torch": st.sampled_from(TORCHES),
        "torch_npu": st.sampled_from(sorted(BY_BUILD)),
        "cann": st.sampled_from(CANNS),
        "python": st.sampled_from(PYTHONS),
        "hdk": st.sampled_from(["25.5.1", "25.2.0", "25.0.rc1.1", "24.1.rc3", "24.1.0", "26.1.0", "23.0.3"]),
        "mindspeed_mm": st.sampled_from([row["mindspeed_mm"] for row in MM]),
        "mindie_sd": st.sampled_from(["3.0.0", "2.3.0"]),
        "soc": st.sampled_from(["910B2", "A3", "310P3", "950"]),
        "machine": st.sampled_from(["x86_64", "aarch64"]),
    },
)


@lru_cache(maxsize=None)
def sets(**fixed: str) -> tuple[Solution, ...]:
    """The same question is asked of many rows."""
    return solve(**fixed).solutions


def best(**fixed: str) -> Solution:
    answer = solve(**fixed)
    assert answer.best is not None, answer.why
    return answer.best


# Rows of the compatibility table of Ascend/pytorch; the first is the set that the field's walk-through calls fitting.
@pytest.mark.parametrize(
    ("torch", "cann", "torch_npu", "release"),
    [
        ("2.6.0", "8.2.RC1", "2.6.0", "7.1.0"),
        ("2.7.1", "8.3.RC1", "2.7.1", "7.2.0"),
        ("2.7.1", "8.5.0", "2.7.1.post2", "7.3.0"),
        ("2.7.1", "9.1.0", "2.7.1.post8", "26.1.0"),
        ("2.9.0", "9.0.0", "2.9.0.post2", "26.0.0"),
        ("2.1.0", "8.0.RC2", "2.1.0.post6", "6.0.rc2"),
        ("2.12.0", "9.1.0", "2.12.0", "26.1.0"),
    ],
)
def test_the_vendors_pairs(torch: str, cann: str, torch_npu: str, release: str) -> None:
    found = best(torch=torch, cann=cann)
    assert (found.torch_npu, found.release, found.status, found.exact) == (torch_npu, release, "general", True)
    assert best(torch_npu=torch_npu).cann == cann


# Release notes and install guide of MindSpeed-MM: the set that each version was made with.
@pytest.mark.parametrize(
    ("mindspeed_mm", "release", "cann", "branch", "core"),
    [
        ("26.1.0", "26.1.0", "9.1.0", "26.1.0_core_r0.12.1", "0.12.1"),
        ("26.0.0", "26.0.0", "9.0.0", "26.0.0_core_r0.12.1", "0.12.1"),
        ("2.3.0", "7.3.0", "8.5.0", "2.3.0_core_r0.12.1", "0.12.1"),
        ("2.2.0", "7.2.0", "8.3.RC1", "2.2.0_core_r0.12.1", "0.12.1"),
        ("2.1.0", "7.1.0", "8.2.RC1", "2.1.0_core_r0.8.0", "0.8.0"),
        ("1.0.0", "6.0.0", "8.0.0", "1.0.0_core_r0.6.0", "0.6.0"),
    ],
)
def test_mindspeed_mm(mindspeed_mm: str, release: str, cann: str, branch: str, core: str) -> None:
    found = best(mindspeed_mm=mindspeed_mm)
    assert (found.release, found.cann, found.exact) == (release, cann, True)
    assert (found.mindspeed_mm, found.mindspeed, found.megatron_core) == (mindspeed_mm, branch, core)
    assert found.python[0] == "3.10"


def test_what_mindspeed_mm_excludes() -> None:
    assert not solve(mindspeed_mm="26.1.0", cann="8.3.RC1").solutions
    assert not solve(mindspeed_mm="26.0.0", cann="9.1.0").solutions
    assert solve(mindspeed_mm="26.0.0", cann="8.3.RC1").solutions
    assert not solve(mindspeed_mm="26.1.0", python="3.11").solutions


def test_mindie_sd_prefers_its_own_set_and_admits_its_span() -> None:
    own = best(mindie_sd="3.0.0")
    assert (own.torch, own.release, own.cann) == ("2.9.0", "7.3.0", "8.5.1")
    both = best(mindie_sd="3.0.0", mindspeed_mm="2.3.0")  # installation.md: torch 2.6 to 2.9, CANN from 8.0.0
    assert (both.torch_npu, both.cann) == ("2.7.1.post2", "8.5.0")
    assert not solve(mindie_sd="3.0.0", torch="2.12.0").solutions
    assert best(mindie_sd="2.3.0").torch == "2.1.0"


def test_series_that_mix_come_after_exact_pairs() -> None:
    mixed = best(torch="2.6.0", cann="9.1.0")  # TorchNPU 7.3 runs on CANN 9.1, by its release notes
    assert (mixed.torch_npu, mixed.release, mixed.exact) == ("2.6.0.post5", "7.3.0", False)
    assert "2.6.0.post5" in mixed.notes[0]
    assert best(torch="2.9.0", cann="9.0.0").exact


def test_the_trap_of_the_walk_through() -> None:
    """CANN 8.2.RC1 was installed, then torch 2.7.1: no torch_npu was ever released for the two."""
    why = solve(torch="2.7.1", cann="8.2.RC1").why
    assert why.startswith("torch 2.7.1 and CANN 8.2.RC1 do not fit together")
    assert "with torch 2.7.1, CANN may be 9.1.0" in why
    assert "8.3.RC1" in why
    assert "with CANN 8.2.RC1, torch may be 2.6.0, 2.5.1, 2.1.0" in why
    assert isinstance(why, Message)
    assert "不配套" in told(why, "zh")


def test_the_smallest_conflict_is_told() -> None:
    two = {"mindspeed_mm": "2.1.0", "torch": "2.6.0", "python": "3.8"}  # torch_npu for torch 2.6 begins at Python 3.9
    assert solve(**two).why.startswith("torch 2.6.0 and Python 3.8 do not fit together")
    other = {"torch": "2.7.1", "cann": "8.3.RC1", "mindspeed_mm": "2.3.0"}  # which is for CANN 8.5
    assert solve(**other).why.startswith("CANN 8.3.RC1 and MindSpeed-MM 2.3.0 do not fit together")


def test_three_that_exclude_each_other_only_together() -> None:
    """Of torch_npu for torch 2.6 only that for CANN 8.5 has a wheel for Python 3.12; the document stops at 3.11."""
    three = {"torch": "2.6.0", "cann": "8.3.RC1", "python": "3.12"}
    for left_out in three:
        assert solve(**{name: text for name, text in three.items() if name != left_out}).solutions
    why = solve(**three).why
    assert why.startswith("torch 2.6.0, CANN 8.3.RC1 and Python 3.12 do not fit together")
    assert "with torch 2.6.0, CANN 8.3.RC1, Python may be 3.11, 3.10, 3.9" in why


@pytest.mark.parametrize(
    ("name", "typed", "meant"),
    [
        ("torch", "v2.7.1", "2.7.1"),
        ("torch", "2.7.1+cpu", "2.7.1"),
        ("torch", "2.7", "2.7.1"),
        ("cann", "8.2rc1", "8.2.RC1"),
        ("cann", "8.2.rc1", "8.2.RC1"),
        ("cann", "CANN 8.2.RC1", "8.2.RC1"),
        ("cann", "V8.2.RC1.B150", "8.2.RC1"),
        ("cann", "cann-8.5.0", "8.5.0"),
        ("torch_npu", "2.7.1-post2", "2.7.1.post2"),
        ("torch_npu", "v2.7.1.post2+gitabcdef", "2.7.1.post2"),
        ("torch_npu", "2.7.1.rc1", "2.7.1rc1"),
        ("python", "3.11.4", "3.11"),
        ("python", "cp311", "3.11"),
        ("python", "Python 3.11", "3.11"),
        ("machine", "arm64", "aarch64"),
        ("machine", "AMD64", "x86_64"),
        ("soc", "910B2", "ascend910b"),
        ("soc", "Ascend910B4-1", "ascend910b"),
        ("soc", "A3", "ascend910_93"),
        ("soc", "Ascend910_9382", "ascend910_93"),
        ("soc", "910ProB", "ascend910"),
        ("soc", "310P3", "ascend310p"),
        ("mindspeed_mm", "v2.2.0", "2.2.0"),
        ("mindspeed_mm", "2.2", "2.2.0"),
    ],
)
def test_loose_spelling(name: str, typed: str, meant: str) -> None:
    assert asked(name, typed).values == (meant,)


def test_a_train_may_be_typed_for_torch_npu() -> None:
    """The walk-through writes torch_npu 7.1.0; that is the train, of three torch releases."""
    assert {BY_BUILD[build]["torch"] for build in asked("torch_npu", "7.1.0").values} == {"2.1.0", "2.5.1", "2.6.0"}
    assert best(torch="2.6.0", torch_npu="7.1.0").torch_npu == "2.6.0"
    assert best(torch_npu="6.0.rc3", torch="2.4.0").torch_npu == "2.4.0"


def test_part_of_a_version_stands_for_all_that_begin_so() -> None:
    assert set(asked("cann", "8.5").values) == {"8.5.0", "8.5.1", "8.5.2"}
    assert "8.3.RC1" not in asked("cann", "8.2").values
    assert "2.10.0" not in asked("torch", "2.1").values


def test_a_driver_of_its_own_number_is_taken_for_its_series() -> None:
    found = best(hdk="24.1.5", cann="8.3.RC1")
    assert found.hdk[0].startswith("24.1.")
    assert found.confidence == "inferred"
    assert best(hdk="25.2.3", cann="8.2.RC1").hdk == ("25.2.x",)  # CANN's notes name the whole series
    assert "25.0.RC1" in best(hdk="25.0.rc1.1", cann="8.2.RC1").hdk  # so the driver of HDK 25.0.RC1 names itself


def test_hdks_of_the_950_are_for_the_950_alone() -> None:
    assert best(soc="950", cann="9.1.0").hdk == ("25.7.RC1", "25.6.RC1", "25.1.RC1")
    assert not {"25.7.RC1", "25.6.RC1", "25.1.RC1"} & set(best(soc="910B2", cann="9.1.0").hdk)
    assert best(hdk="25.7.RC1").soc == "ascend950"
    assert "SoC" in solve(soc="950", cann="8.3.RC1").why


@pytest.mark.parametrize(
    ("name", "text", "near"),
    [
        ("torch", "2.7.9", "2.7.1"),
        ("cann", "8.4.RC1", "8.3.RC1"),
        ("torch_npu", "2.7.1.post99", "2.7.1.post11"),
        ("hdk", "19.0.0", "23.0.x"),
        ("python", "3.20", "3.14"),
        ("mindspeed_mm", "27.0.0", "26.1.0"),
        ("mindie_sd", "3.1.0", "3.0.0"),
    ],
)
def test_unknown_versions_name_the_closest(name: str, text: str, near: str) -> None:
    answer = solve(**{name: text})
    assert answer.best is None
    assert f"{text} is unknown to this tool" in answer.why
    assert near in answer.why.split("knows: ")[1].split(", ")
    assert "不认识" in told(answer.why, "zh")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("torch", "banana"),
        ("torch_npu", "2"),
        ("cann", "latest"),
        ("python", "2.7"),
        ("hdk", "new"),
        ("machine", "riscv"),
        ("soc", "H100"),
        ("mindspeed_mm", "main"),
    ],
)
def test_what_is_no_version_is_refused(name: str, text: str) -> None:
    with pytest.raises(VersionError, match=text):
        solve(**{name: text})


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(LABELS)), st.text() | st.from_regex(r"[v ]?[0-9]{1,12}([.-]([0-9]{1,12}|rc1|post1|x)){0,5}")
)
def test_any_text_is_read_or_refused(name: str, text: str) -> None:
    try:
        read = asked(name, text)
    except VersionError:
        return
    assert set(read.values) <= {*known(name), "x86_64", "aarch64"}
    assert read.values or read.nearest()


def test_a_build_of_no_known_cann_has_no_set() -> None:
    why = solve(torch="2.14.0").why
    assert "no source says with what torch 2.14.0 goes" in why
    assert "2.12.0" in why


def test_a_python_without_a_wheel_is_told() -> None:
    found = best(torch="2.12.0", cann="9.1.0", python="3.14")  # documented up to 3.14, wheels up to 3.13
    assert found.torch_npu == "2.12.0"
    assert any("no wheel" in note for note in found.notes)
    assert any("./torch_npu-2.12.0-cp314-cp314-" in command for step in found.install for command in step.commands)


def test_what_is_out_of_maintenance_is_told() -> None:
    assert any("2025-12-30" in note for note in best(torch="2.1.0").notes)  # SUPPORT.en.md


def _key(found: Solution) -> tuple[object, ...]:
    """The documented order, without MindSpeed-MM and MindIE-SD."""
    row = BY_BUILD[found.torch_npu]
    return (
        RELEASED.index(row["status"]),
        SURE.index(row["confidence"]),
        row["cann"] != found.cann,
        not set(found.python) & set(row["python_wheels"].split()),
        BUILDS.index(row),  # the table is newest first; test_tables.py
    )


GENERAL = [row for row in BUILDS if row["status"] == "general"]


@pytest.mark.parametrize("row", GENERAL, ids=lambda row: row["torch_npu"])
def test_a_general_row_from_some_of_its_own_values(row: dict[str, str]) -> None:
    """…gives itself, or what stands before it in the documented order."""
    python = row["python_documented"].partition("-")[0]
    values = {"torch": row["torch"], "torch_npu": row["torch_npu"], "cann": row["cann"], "python": python}
    for size in range(len(values) + 1):
        for names in combinations(values, size):
            found = sets(**{name: values[name] for name in names})
            keys = [_key(solution) for solution in found]
            assert keys == sorted(keys)
            own = [s for s in found if (s.torch_npu, s.cann) == (row["torch_npu"], row["cann"])]
            assert len(own) == 1
            assert keys[0] <= _key(own[0])
            if "torch_npu" in names:
                assert (found[0].torch_npu, found[0].cann) == (row["torch_npu"], row["cann"])


@settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "torch": st.sampled_from(TORCHES),
            "torch_npu": st.sampled_from(sorted(BY_BUILD)),
            "cann": st.sampled_from(CANNS),
            "python": st.sampled_from(PYTHONS),
        },
    )
)
def test_the_sets_are_those_that_trying_all_finds(fixed: dict[str, str]) -> None:
    found = {(solution.torch_npu, solution.cann) for solution in solve(**fixed).solutions}
    assert found == set(pairs(**fixed))


@settings(max_examples=25, deadline=None)
@given(FIXED)
def test_every_set_keeps_every_rule(fixed: dict[str, str]) -> None:
    for found in solve(**fixed).solutions:
        build = BY_BUILD[found.torch_npu]
        assert build["torch"] == found.torch
        assert runs_on(build, found.cann)
        assert found.exact == (build["cann"] == found.cann)
        assert found.python
        assert all(takes(build, python) for python in found.python)
        listed = drivers(found.cann)
        assert listed is None or set(found.hdk) <= listed
        assert SURE.index(found.confidence) >= SURE.index(build["confidence"])
        if found.mindspeed_mm:
            row = next(row for row in MM if row["mindspeed_mm"] == found.mindspeed_mm)
            assert found.torch in row["torch"].split()
            assert two_numbers(found.release) in {two_numbers(train) for train in row["torch_npu_release"].split()}
            assert two_numbers(found.cann) in {two_numbers(cann) for cann in row["cann"].split()}
            assert found.python[0] in row["python"].split()
        assert found.mindspeed_mm or "mindspeed_mm" not in fixed
        assert found.mindie_sd or "mindie_sd" not in fixed
        assert found.sources


@settings(max_examples=25, deadline=None)
@given(FIXED, st.data())
def test_fixing_more_leaves_no_more(fixed: dict[str, str], data: st.DataObject) -> None:
    more = {**data.draw(FIXED), **fixed}
    few, many = solve(**more).solutions, solve(**fixed).solutions
    before = {(found.torch_npu, found.cann): found for found in many}
    for found in few:
        same = before[found.torch_npu, found.cann]
        assert set(found.hdk) <= set(same.hdk)
        assert set(found.python) <= set(same.python)


@settings(max_examples=25, deadline=None)
@given(FIXED)
def test_no_set_is_always_explained_and_what_is_called_legal_is(fixed: dict[str, str]) -> None:
    answer = solve(**fixed)
    assert bool(answer.solutions) != bool(answer.why)
    if answer.why:
        assert isinstance(answer.why, Message)
    for name in fixed.keys() - {"machine"}:
        others = {key: value for key, value in fixed.items() if key != name}
        for value in legal(name, [asked(key, text) for key, text in others.items()])[:3]:
            text = value.replace(".x", ".0") if name == "hdk" else value
            assert solve(**others, **{name: text}).solutions


def test_every_known_hdk_is_of_a_cann() -> None:
    assert {entry for row in HDK for entry in row["hdk"].split()} == set(known("hdk"))


# Installation


def _place(commands: list[str], part: str) -> int:
    return next(place for place, command in enumerate(commands) if part in command)


@pytest.mark.parametrize("row", [row for row in BUILDS if row["cann"]], ids=lambda row: row["torch_npu"])
def test_the_order_of_installation(row: dict[str, str]) -> None:
    """Driver, toolkit, operators, its set_env.sh, Python, torch, NNAL, its set_env.sh: the vendor's guide, and why."""
    answer = solve(torch_npu=row["torch_npu"], cann=row["cann"])
    if answer.best is None:
        assert not row["python_documented"]  # no Python is known for it
        return
    commands = [command for step in answer.best.install for command in step.commands]
    places = [
        _place(commands, "-npu-driver_"),
        _place(commands, "-npu-firmware_"),
        _place(commands, "reboot"),
        _place(commands, f"Ascend-cann-toolkit_{row['cann']}_linux-"),
        next(place for place, command in enumerate(commands) if "-ops_" in command or "-kernels" in command),
        _place(commands, f"source {set_env(row['cann'])}"),
        _place(commands, "-m venv"),
        _place(commands, "torch_npu"),
        _place(commands, f"Ascend-cann-nnal_{row['cann']}_linux-"),
        _place(commands, "source /usr/local/Ascend/nnal/atb/set_env.sh"),
    ]
    assert places == sorted(places)
    assert not any("http" in command.replace("https://download.pytorch.org/whl/cpu", "") for command in commands)


@pytest.mark.parametrize(
    ("cann", "script"),
    [
        ("8.3.RC1", "/usr/local/Ascend/ascend-toolkit/set_env.sh"),
        ("8.5.0", "/usr/local/Ascend/cann/set_env.sh"),
        ("9.1.0", "/usr/local/Ascend/cann/set_env.sh"),
        ("7.0.0", "/usr/local/Ascend/ascend-toolkit/set_env.sh"),
    ],
)
def test_set_env_of_both_layouts(cann: str, script: str) -> None:
    assert set_env(cann) == script


# File names as vLLM-Ascend, MindSpeed and the CANN samples write them in their instructions.
@pytest.mark.parametrize(
    ("cann", "soc", "machine", "file"),
    [
        ("8.1.RC1", "ascend910b", "aarch64", "Ascend-cann-kernels-910b_8.1.RC1_linux-aarch64.run"),
        ("8.3.RC1", "ascend910_93", "aarch64", "Atlas-A3-cann-kernels_8.3.RC1_linux-aarch64.run"),
        ("8.0.RC2", "ascend310p", "aarch64", "Ascend-cann-kernels-310p_8.0.RC2_linux*.run"),
        ("8.5.0", "ascend910b", "x86_64", "Ascend-cann-910b-ops_8.5.0_linux-x86_64.run"),
        ("8.5.0", "ascend910_93", "aarch64", "Ascend-cann-A3-ops_8.5.0_linux-aarch64.run"),
        ("9.0.0", "ascend950", "aarch64", "Ascend-cann-950-ops_9.0.0_linux-aarch64.run"),
    ],
)
def test_packages_of_operators(cann: str, soc: str, machine: str, file: str) -> None:
    assert operators(cann, soc, machine) == file


def test_the_driver_is_named_as_its_files_are() -> None:
    found = best(hdk="25.0.RC1", cann="8.1.RC1", machine="x86_64", soc="910B3")
    commands = [command for step in found.install for command in step.commands]
    assert commands[0] == "bash ./Ascend-hdk-910b-npu-driver_25.0.rc1*_linux-x86-64.run --full --force"


@pytest.mark.parametrize(
    ("torch", "machine", "wanted"),
    [
        ("2.7.1", "x86_64", "torch==2.7.1+cpu torch_npu==2.7.1.post8 "),
        ("2.7.1", "aarch64", "torch==2.7.1 torch_npu==2.7.1.post8 "),
        ("2.11.0", "x86_64", "torch==2.11.0+cpu torch_npu==2.11.0 "),
        ("2.12.0", "x86_64", "torch==2.12.0 torch_npu==2.12.0 "),
    ],
)
def test_the_pip_line(torch: str, machine: str, wanted: str) -> None:
    """x86-64 wheels up to 2.11 ask for torch==X+cpu, which only PyTorch's index has; their metadata says so."""
    commands = [c for step in best(torch=torch, machine=machine, cann="9.1.0").install for c in step.commands]
    line = next(command for command in commands if "torch_npu==" in command)
    assert wanted in line
    assert ("--extra-index-url https://download.pytorch.org/whl/cpu" in line) == ("+cpu" in line)


def test_stacks_are_installed_when_they_were_asked_for() -> None:
    asked_for = [c for step in best(mindspeed_mm="26.0.0", mindie_sd="3.0.0").install for c in step.commands]
    assert any("26.0.0_core_r0.12.1" in command for command in asked_for)
    assert any("core_v0.12.1" in command and "megatron" in command for command in asked_for)
    assert any("diffusers==0.29.0" in command for command in asked_for)
    plain = [command for step in best(torch="2.7.1").install for command in step.commands]
    assert not any("MindSpeed" in command or "diffusers" in command for command in plain)


def test_each_step_is_told_in_both_languages() -> None:
    for step in best(torch="2.7.1", mindspeed_mm="26.0.0", mindie_sd="3.0.0").install:
        for text in (step.title, step.why):
            assert not text or isinstance(text, Message)
