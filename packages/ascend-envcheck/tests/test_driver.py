"""Driver, firmware and NPUs: the order of versions, the version files, and what npu-smi says of the chips.

Version files and their ranges are as the vendor's packages hold them; which driver goes with which CANN is what the
release notes of CANN print.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import ASCEND, TABLE, FakeMachine, healthy
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_envcheck import Finding, Severity, Snapshot, check
from ascend_envcheck.messages import Message
from ascend_envcheck.probes import driver as probe
from ascend_envcheck.probes.place import Place
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.rules import chips, driver, driver_versions, npu
from ascend_envcheck.rules.npu import soc
from ascend_envcheck.snapshot import CommandFacts, HostFacts, ImportFacts
from ascend_envcheck.tables import records
from ascend_envcheck.versions import driver_version, is_listed, is_within, numbers, ranges

RULES = (*driver.RULES, *driver_versions.RULES, *npu.RULES, *chips.RULES)
SMI = {path.stem: path.read_text() for path in (Path(__file__).parent / "data/npu_smi").glob("*.txt")}
FAIL, WARN, INFO, SKIP = Severity.FAIL, Severity.WARN, Severity.INFO, Severity.SKIP

DRIVER, FIRMWARE = "/usr/local/Ascend/driver/version.info", "/usr/local/Ascend/firmware/version.info"
DRIVER_25_3 = (
    "Version=25.3.rc1\nascendhal_version=7.35.23\nInnerversion=V100R001C23SPC002B212\n"
    "compatible_version=[V100R001C19],[V100R001C20]\ncompatible_version_fw=[7.0.0,8.9.9]\npackage_version=25.3.rc1\n"
)
FIRMWARE_7_7 = (
    "Version=7.7.0.1.231\nfirmware_version=1.0\npackage_version=25.0.rc1.1\n"
    "compatible_version_drv=[23.0.0,23.0.0.],[24.0,24.0.],[24.1,24.1.],[25.0,25.0.],[25.3,25.3.]\n"
)
CANN = "/usr/local/Ascend/cann"
COPY = HostFacts()  # what is known of the host of copied files


def with_npu(
    files: dict[str, str] | None = None,
    smi: str = TABLE,
    *,
    cann: str = "",
    host: HostFacts = COPY,
    **more: object,
) -> Snapshot:
    """A machine with an NPU."""
    texts = dict(files or {})
    if cann:
        texts[f"{CANN}/share/info/runtime/version.info"] = f"version_dir={cann}\n"
    made = Snapshot(
        devices={"/dev/davinci0": "rw", "/dev/davinci_manager": "rw"},
        files=texts,
        cann_homes=(CANN,) if cann else (),
        commands={"npu-smi info": CommandFacts("ok", output=smi)},
        host=host,
    )
    return replace(made, **more)  # type: ignore[arg-type]


def findings(rule: str, snapshot: Snapshot) -> tuple[Finding, ...]:
    return check(snapshot, only=[rule], rules=RULES).findings


def only(rule: str, snapshot: Snapshot) -> Finding:
    (finding,) = findings(rule, snapshot)
    return finding


def with_answer(snapshot: Snapshot, line: str, output: str) -> Snapshot:
    return replace(snapshot, commands={**snapshot.commands, line: CommandFacts("ok", output=output)})


# --- versions

IN_ORDER = (
    *("22.0.4", "23.0.rc3", "23.0.0", "23.0.3", "24.1.rc1", "24.1.rc2.2", "24.1.rc3.b999", "24.1.rc3", "24.1.rc3.7"),
    *("24.1.0", "24.1.1", "25.0.rc1.1", "25.2.0", "25.2.3", "25.2.3.1", "25.3.rc1", "25.5.2", "26.0.RC1", "26.0.rc2"),
    *("26.1.0.alpha1", "26.1.0.b087", "26.1.0.beta1", "26.1.0.rc1", "26.1.0", "26.1.0.1", "26.1.1"),
)
STAGES = ("alpha{}", "beta{}", "b{:03}", "rc{}", "rc{}.7", "")


def test_versions_of_the_field_are_in_their_order() -> None:
    read = [driver_version(text) for text in IN_ORDER]
    assert None not in read
    assert read == sorted(read)  # type: ignore[type-var]
    assert len(set(read)) == len(read)


@pytest.mark.parametrize(
    "text", ["", "25", "25.3.rc", "25.3.rc1x", "NA", "V100R001C23", "25.5.x", "٢٥.٣", "25.3.rc1 or NA"]
)
def test_what_is_no_version(text: str) -> None:
    assert driver_version(text) is None


def spelled(number: tuple[int, int, int], stage: str, at: int) -> str:
    return ".".join([*map(str, number), stage.format(at)]).rstrip(".")


VERSIONS = st.builds(
    spelled,
    st.tuples(st.integers(22, 27), st.integers(0, 7), st.integers(0, 3)),
    st.sampled_from(STAGES),
    st.integers(1, 9),
)


@settings(deadline=None)
@given(VERSIONS, VERSIONS, VERSIONS)
def test_the_order_is_total(first: str, second: str, third: str) -> None:
    a, b, c = driver_version(first), driver_version(second), driver_version(third)
    assert a is not None
    assert b is not None
    assert c is not None
    assert (a < b) + (b < a) + (a == b) == 1
    assert not (a <= b <= c) or a <= c


@settings(deadline=None)
@given(st.tuples(st.integers(22, 27), st.integers(0, 7), st.integers(0, 3)), st.integers(1, 99), st.integers(1, 9))
def test_alpha_before_beta_before_rc_before_final_before_patch(
    number: tuple[int, int, int], at: int, patch: int
) -> None:
    base = ".".join(map(str, number))
    for early in (f"{base}.beta{at}", f"{base}.b{at:03}"):
        row = (f"{base}.alpha{at}", early, f"{base}.rc{at}", f"{base}.rc{at}.{patch}", base, f"{base}.{patch}")
        read = [driver_version(text) for text in row]
        assert all(a is not None and b is not None and a < b for a, b in zip(read, read[1:]))


@settings(deadline=None)
@given(st.text(max_size=40))
def test_no_text_raises(text: str) -> None:
    driver_version(text)
    numbers(text)
    for low, high in ranges(text):
        is_within(text, low, high)


@pytest.mark.parametrize(
    ("version", "entry", "expected"),
    [
        ("24.1.rc3.7", "24.1.RC3", True),
        ("24.1.rc3.b999", "24.1.RC3", True),
        ("24.1.0", "24.1.RC3", False),
        ("25.2.3.1", "25.2.x", True),
        ("25.2.rc1", "25.2.x", True),
        ("25.0.rc1.1", "25.0.RC1", True),
        ("26.1.0.b087", "26.1.0", True),
        ("26.1.1", "26.1.0", False),
        ("25.2.3.0", "25.2.3", True),
        ("26.1.0", "junk", False),
        ("26.1.0", ".x", False),
    ],
)
def test_what_an_entry_of_a_table_means(version: str, entry: str, expected: bool) -> None:
    read = driver_version(version)
    assert read is not None
    assert is_listed(read, entry) is expected


@pytest.mark.parametrize(
    ("version", "low", "high", "expected"),
    [
        ("7.7.0.1.231", "7.0.0", "8.9.9", True),
        ("9.0.0.9.220", "7.0.0", "8.9.9", False),
        ("7.2.99.1.231", "7.0.0", "7.2.99", True),
        ("7.3.0", "7.0.0", "7.2.99", False),
        ("6.9.9", "7.0.0", "8.9.9", False),
        ("6.4.12.1.241", "6.4.0", "6.4.99", True),
        ("25.0.rc1.1", "25.0", "25.0.", True),
        ("25.2.0", "25.0", "25.0.", False),
        ("23.0.3", "23.0.0", "23.0.0.", False),
        ("NA", "7.0.0", "8.9.9", False),
    ],
)
def test_ranges_of_version_files(version: str, low: str, high: str, expected: bool) -> None:
    assert is_within(version, low, high) is expected


def test_several_ranges_of_a_310p() -> None:
    assert ranges("[6.4.0,6.4.99],[7.0.0,8.9.9]") == [("6.4.0", "6.4.99"), ("7.0.0", "8.9.9")]


def test_every_entry_of_the_table_can_be_read() -> None:
    for row in records("hdk"):
        assert row["confidence"] in ("official", "secondary", "tested-list")
        assert row["source"]
        for entry in row["hdk"].split():
            assert driver_version(entry.replace(".x", ".0")), entry


# --- driver and firmware


def test_a_healthy_machine(machine: FakeMachine) -> None:
    healthy(machine)
    seen = machine.snapshot()
    for finding in check(seen, rules=RULES).findings:
        assert finding.severity in (INFO, SKIP), finding
        assert isinstance(finding.cause, Message)
        assert finding.cause.in_chinese != str(finding.cause)


def test_without_an_npu_all_is_skipped() -> None:
    for finding in check(Snapshot(), rules=RULES).findings:
        assert finding.severity is SKIP, finding


def test_every_rule_speaks_of_every_machine() -> None:
    for smi in SMI.values():
        told = {finding.id for finding in check(with_npu({DRIVER: DRIVER_25_3}, smi), rules=RULES).findings}
        assert told == {rule.id for rule in RULES}


def test_where_the_driver_may_lie() -> None:
    note = "UserName=HwHiAiUser\nDriver_Install_Path_Param=/opt/Ascend\n"
    assert probe.driver_homes(note, {"ASCEND_DRIVER_PATH": "/data/driver/"}) == [
        "/opt/Ascend/driver",
        "/data/driver",
        "/data/driver/driver",
        "/usr/local/Ascend/driver",
        "/usr/local/npu/driver",
    ]
    assert probe.driver_homes("", {}) == ["/usr/local/Ascend/driver", "/usr/local/npu/driver"]


def test_the_file_that_the_installer_names_wins(machine: FakeMachine) -> None:
    healthy(machine)
    machine.file("/etc/ascend_install.info", "Driver_Install_Path_Param=/opt/Ascend\nDriver_Install_Status=complete\n")
    machine.file("/opt/Ascend/driver/version.info", "Version=25.5.2\n")
    seen = Snapshot.from_json(machine.snapshot().to_json())
    assert only("DRV-FILE", seen).cause.endswith("/opt/Ascend/driver/version.info")
    assert "driver 25.5.2" in only("DRV-VER", seen).cause


@pytest.mark.parametrize(
    ("host", "variables", "severity"),
    [
        (HostFacts(), {}, SKIP),
        (HostFacts(live=True, container="docker"), {}, SKIP),
        (HostFacts(live=True), {"ASCEND_RUNTIME_OPTIONS": "NODRV"}, SKIP),
        (HostFacts(live=True), {}, WARN),
    ],
)
def test_no_version_file(host: HostFacts, variables: dict[str, str], severity: Severity) -> None:
    assert only("DRV-FILE", with_npu(host=host, variables=variables)).severity is severity


@pytest.mark.parametrize(
    ("note", "severity"),
    [("Driver_Install_Status=complete\n", INFO), ("Driver_Install_Status=incomplete\n", WARN), ("UserName=x\n", SKIP)],
)
def test_the_state_of_the_installation(note: str, severity: Severity) -> None:
    assert only("DRV-INSTALL-STATE", with_npu({"/etc/ascend_install.info": note})).severity is severity


def test_the_package_version_is_preferred() -> None:
    text = "Version=7.5.0.1\npackage_version=25.0.rc1.1\n"
    assert "25.0.rc1.1" in only("DRV-VER", with_npu({DRIVER: text})).cause
    assert "25.2.0 (npu-smi info)" in only("DRV-VER", with_npu()).cause, "without a file, the one that runs"
    assert only("DRV-VER", with_npu({DRIVER: "Version=main\n"})).severity is SKIP
    assert only("DRV-VER", with_npu(smi="")).severity is SKIP


@pytest.mark.parametrize(
    ("driver_text", "cann", "severity"),
    [
        # CANN 9.1.0 release notes, compatibility: 8.5.2 and 9.0.X run on 25.0.X to 26.1.0, 9.1.X not on 25.0.X.
        ("26.1.0", "9.1.0", INFO),
        ("26.1.1", "9.1.0", INFO),
        ("25.2.3.1", "9.1.0", INFO),
        ("25.0.rc1.1", "9.1.0", FAIL),
        ("25.0.rc1.1", "9.0.0", INFO),
        ("26.0.rc3", "9.0.1", INFO),
        ("24.1.0", "8.5.2", FAIL),
        # CANN 8.5.0 release notes: 25.0.X, 25.2.X, 25.3.X, 25.5.X.
        ("25.3.rc1", "8.5.0", INFO),
        ("25.5.1", "8.5.1", INFO),
        ("26.1.0", "8.5.0", WARN),  # newer than the list
        ("24.1.rc3.7", "8.5.0", FAIL),
        # MindIE 2.1.RC1 with CANN 8.2.RC1: 24.1.RC2 to 25.2.0.
        ("24.1.0", "8.2.RC1", INFO),
        ("23.0.3", "8.2.RC1", FAIL),
        # No list of the vendor's: never more than a warning.
        ("23.0.0", "8.1.RC1", WARN),
        ("25.0.rc1.1", "8.1.RC1", INFO),
        ("23.0.3", "7.0.0", INFO),
        # The 950's drivers have numbers of their own.
        ("25.7.rc1", "9.1.0", INFO),
        ("25.1.rc1", "8.2.RC1", SKIP),
        # What no list names.
        ("26.1.0", "10.0.0", SKIP),
        ("junk", "9.1.0", SKIP),
    ],
)
def test_driver_and_cann(driver_text: str, cann: str, severity: Severity) -> None:
    finding = only("HDK-PAIR", with_npu({DRIVER: f"package_version={driver_text}\n"}, cann=cann))
    assert finding.severity is severity
    assert finding.blocks == (("npu",) if severity is FAIL else ())
    assert finding.doubts == (("npu",) if severity is WARN else ())


def test_the_driver_to_install_is_not_one_of_the_950() -> None:
    finding = only("HDK-PAIR", with_npu({DRIVER: "Version=24.1.0\n"}, cann="9.1.0"))
    assert "HDK 26.1.x" in finding.command


def test_driver_and_cann_in_a_container() -> None:
    """Without version.info the header of npu-smi tells: 24.1.0 is older than any that CANN 9.0.0 runs on."""
    assert only("HDK-PAIR", with_npu(smi=TABLE.replace("25.2.0", "24.1.0"), cann="9.0.0")).severity is FAIL
    assert only("HDK-PAIR", with_npu(smi="", cann="9.0.0")).severity is SKIP
    assert only("HDK-PAIR", with_npu()).severity is SKIP


def test_driver_and_firmware_that_admit_each_other() -> None:
    assert only("FW-DRV-CROSS", with_npu({DRIVER: DRIVER_25_3, FIRMWARE: FIRMWARE_7_7})).severity is INFO


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Version=7.7.0.1.231", "Version=9.0.0.9.220", "firmware 9.0.0.9.220 is outside 7.0.0-8.9.9"),
        (",[25.3,25.3.]", "", "driver 25.3.rc1 is outside 23.0.0-23.0.0."),
    ],
)
def test_driver_and_firmware_that_do_not(old: str, new: str, words: str) -> None:
    finding = only("FW-DRV-CROSS", with_npu({DRIVER: DRIVER_25_3, FIRMWARE: FIRMWARE_7_7.replace(old, new)}))
    assert (finding.severity, finding.blocks) == (FAIL, ("npu",))
    assert words in finding.cause


def test_the_firmware_of_the_board_where_there_is_no_file() -> None:
    board = SMI["board"].replace("Firmware Version               : NA", "Firmware Version               : 9.9.0.1")
    seen = with_answer(with_npu({DRIVER: DRIVER_25_3}), "npu-smi info -t board -i 0", board)
    assert "9.9.0.1" in only("FW-VER", seen).cause
    assert only("FW-DRV-CROSS", seen).severity is FAIL
    plain = with_answer(with_npu({DRIVER: DRIVER_25_3}), "npu-smi info -t board -i 0", SMI["board"])
    assert only("FW-VER", plain).severity is SKIP
    assert only("FW-DRV-CROSS", plain).severity is SKIP


def test_version_files_without_lists() -> None:
    assert only("FW-DRV-CROSS", with_npu({DRIVER: "Version=23.0.0\n", FIRMWARE: "Version=7.1.0\n"})).severity is SKIP


@pytest.mark.parametrize(("word", "severity"), [("OK", INFO), ("NOK", FAIL), ("NA", SKIP)])
def test_the_board(word: str, severity: Severity) -> None:
    text = SMI["board"].replace("Compatibility                  : OK", f"Compatibility                  : {word}")
    assert only("DRV-BOARD-COMPAT", with_answer(with_npu(), "npu-smi info -t board -i 3", text)).severity is severity


HAL = "/usr/local/Ascend/driver/lib64/driver/libascend_hal.so"


@pytest.mark.parametrize(
    ("paths", "load", "live", "severity"),
    [
        ({HAL: HAL}, None, False, INFO),
        ({HAL: HAL}, CommandFacts("ok"), True, INFO),
        ({HAL: HAL}, CommandFacts("failed", "libc_sec.so: cannot open shared object file"), True, FAIL),
        ({}, CommandFacts("ok"), True, INFO),  # it lies where the loader knows
        ({}, CommandFacts("failed", "cannot open shared object file"), True, FAIL),
        ({"/usr/local/Ascend/driver/lib64": "/usr/local/Ascend/driver/lib64"}, None, False, FAIL),
        ({}, None, False, SKIP),
    ],
)
def test_the_library(paths: dict[str, str], load: CommandFacts | None, live: bool, severity: Severity) -> None:
    loads = {"libascend_hal.so": load} if load else {}
    finding = only("DRV-LIBS", with_npu(host=HostFacts(live=live), paths=paths, loads=loads))
    assert finding.severity is severity
    if load and load.detail and paths:
        assert load.detail in finding.cause


@pytest.mark.parametrize(
    ("installed", "host", "severity"),
    [
        ("25.2.0", HostFacts(live=True), INFO),
        ("25.2.0.b012", HostFacts(live=True), INFO),
        ("25.3.rc1", HostFacts(live=True), FAIL),
        ("25.3.rc1", HostFacts(live=True, container="docker"), WARN),
        ("main", HostFacts(live=True), SKIP),
    ],
)
def test_the_driver_that_runs(installed: str, host: HostFacts, severity: Severity) -> None:
    finding = only("DRV-REBOOT", with_npu({DRIVER: f"Version={installed}\n"}, host=host))
    assert finding.severity is severity
    assert severity is not FAIL or "reboot" in finding.cause
    assert only("DRV-REBOOT", with_npu({DRIVER: "Version=25.2.0\n"}, smi="")).severity is SKIP


# --- the NPUs


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (HostFacts(), "usermod -aG HwHiAiUser"),
        (HostFacts(live=True, groups=("HwHiAiUser",)), "ls -l /dev/davinci0"),
        (HostFacts(live=True, root=True), "docker run --device"),
    ],
)
def test_denied_nodes(host: HostFacts, words: str) -> None:
    finding = only("DEV-NODES", with_npu(devices={"/dev/davinci0": "denied"}, host=host))
    assert (finding.severity, finding.blocks) == (FAIL, ("npu",))
    assert words in finding.command


def test_a_950_has_hisi_hdc_alone() -> None:
    nodes = {"/dev/davinci0": "rw", "/dev/hisi_hdc": "rw"}
    assert only("DEV-NODES", with_npu(smi=SMI["950"], devices=nodes)).severity is INFO


def test_nodes_without_a_manager_cannot_be_opened() -> None:
    finding = only("DEV-NODES", with_npu(devices={"/dev/davinci0": "rw"}))
    assert (finding.severity, finding.blocks) == (FAIL, ("npu",))
    assert "davinci_manager" in finding.command


def test_a_driver_without_devices_is_a_container_that_was_given_none() -> None:
    finding = only("DEV-NODES", replace(Snapshot(), files={DRIVER: DRIVER_25_3}))
    assert (finding.severity, finding.blocks) == (WARN, ("npu",))
    assert "container" in finding.cause


def test_npu_smi_that_is_not_there_or_hangs() -> None:
    gone = CommandFacts("missing", "npu-smi is neither on PATH nor in /usr/local/bin")
    finding = only("NPU-SMI", with_npu(commands={"npu-smi info": gone}))
    assert (finding.severity, finding.blocks) == (WARN, ())
    assert "neither on PATH" in finding.cause
    finding = only("NPU-SMI", with_npu(commands={"npu-smi info": CommandFacts("timeout", "no answer within 10 s")}))
    assert (finding.severity, finding.blocks) == (FAIL, ("npu",))
    assert "no answer within 10 s" in finding.cause
    assert "no table" in only("NPU-SMI", with_npu(smi="")).cause


@pytest.mark.parametrize(
    ("nodes", "smi", "seen", "variables", "severity"),
    [
        (2, "910b2", 2, {}, INFO),
        (2, "a3", 2, {}, INFO),  # two dies a card, a node each
        (3, "910b2", 0, {}, WARN),
        (2, "910b2", 1, {}, WARN),
        (2, "910b2", 1, {"ASCEND_RT_VISIBLE_DEVICES": "0"}, INFO),
        (1, "driver-not-loaded", 0, {}, SKIP),
    ],
)
def test_the_count(nodes: int, smi: str, seen: int, variables: dict[str, str], severity: Severity) -> None:
    devices = {f"/dev/davinci{number}": "rw" for number in range(nodes)}
    imports = ImportFacts(device="npu", device_count=seen)
    finding = only("DEV-COUNT", with_npu(smi=SMI[smi], devices=devices, imports=imports, variables=variables))
    assert finding.severity is severity


@pytest.mark.parametrize(
    ("smi", "expected"),
    [
        ("910b2", "ascend910b"),
        ("910b4-busy", "ascend910b"),
        ("a3", "ascend910_93"),
        ("310p3-duo", "ascend310p"),
        ("910prob", "ascend910"),
        ("950", "ascend950"),
        ("device-in-use", None),
    ],
)
def test_the_soc(smi: str, expected: str | None) -> None:
    assert soc(with_npu(smi=SMI[smi])) == expected


def test_the_soc_by_the_map() -> None:
    nameless = with_npu(smi="")
    assert soc(with_answer(nameless, "npu-smi info -m", SMI["map-a2"])) == "ascend910b"
    assert soc(with_answer(nameless, "npu-smi info -m", SMI["map-a3"])) == "ascend910_93"
    assert soc(with_npu(smi=SMI["910b2"].replace("910B2", "Ascend910"))) is None, (
        "Ascend910 is an A3 by its Phy-ID only"
    )


@pytest.mark.parametrize(
    ("smi", "severity"), [("910b2", INFO), ("a3", INFO), ("950", INFO), ("310p3-duo", FAIL), ("910prob", FAIL)]
)
def test_bf16_came_with_the_910b(smi: str, severity: Severity) -> None:
    finding = only("NPU-SOC", with_npu(smi=SMI[smi]))
    assert finding.severity is severity
    assert finding.blocks == (("npu",) if severity is FAIL else ())
    assert finding.tasks == ("train", "infer")


def test_an_unknown_soc() -> None:
    finding = only("NPU-SOC", with_npu(smi=SMI["910b2"].replace("910B2", "1010X")))
    assert finding.severity is SKIP
    assert "1010X" in finding.cause


@pytest.mark.parametrize(
    ("smi", "severity", "words"),
    [
        ("device-in-use", FAIL, "-8020"),
        ("driver-not-loaded", FAIL, "-8005"),
        ("board-type", SKIP, ""),
        ("910b2", INFO, ""),
    ],
)
def test_npus_held_by_others(smi: str, severity: Severity, words: str) -> None:
    finding = only("NPU-SHARE", with_npu(smi=SMI[smi]))
    assert finding.severity is severity
    assert words in finding.cause
    assert only("NPU-SMI", with_npu(smi=SMI["driver-not-loaded"])).severity is FAIL


@pytest.mark.parametrize(
    ("word", "severity"), [("Warning", WARN), ("UNKNOWN", WARN), ("Alarm", FAIL), ("Critical", FAIL)]
)
def test_the_health_of_a_chip(word: str, severity: Severity) -> None:
    ill = with_npu(smi=SMI["910b2"].replace("| OK     ", f"| {word} ", 1))
    finding = only("NPU-HEALTH", ill)
    assert finding.severity is severity
    assert f"NPU 0 is in state {word}" in finding.cause
    assert finding.blocks == (("npu",) if severity is FAIL else ())
    if severity is FAIL:
        assert finding.command.endswith("export ASCEND_RT_VISIBLE_DEVICES=1")
        left_out = replace(ill, variables={"ASCEND_RT_VISIBLE_DEVICES": "1"})
        assert (only("NPU-HEALTH", left_out).severity, only("NPU-HEALTH", left_out).doubts) == (WARN, ())


def test_the_error_code_is_told() -> None:
    ill = with_npu(smi=TABLE.replace("| OK ", "| Alarm "))
    answer = "\tNPU ID      : 0\n\tHealth      : Alarm\n\tError Code  : 80E01801\n"
    finding = only("NPU-HEALTH", with_answer(ill, "npu-smi info -t health -i 0", answer))
    assert finding.cause == "NPU 0 is in state Alarm, error code 80E01801"
    assert finding.command == "npu-smi info -t health -i 0"


@pytest.mark.parametrize(
    ("smi", "severity"),
    [
        ("910b2", INFO),  # 3.4 GB are the driver's own
        ("910b4-busy", WARN),  # 26838 of 32768
        ("310p3-duo", INFO),
        ("910prob", INFO),
        ("950", INFO),
    ],
)
def test_memory_before_a_task(smi: str, severity: Severity) -> None:
    assert only("NPU-HBM", with_npu(smi=SMI[smi])).severity is severity


def test_small_memory_that_the_driver_uses_is_idle() -> None:
    """3.4 GB of 16 GB are more than a fifth, and idle all the same."""
    assert only("NPU-HBM", with_npu(smi=TABLE.replace("65536", "16384"))).severity is INFO


def test_a_table_without_memory() -> None:
    first_row_only = TABLE.replace("| 0                         |", "| cut |")
    assert only("NPU-HBM", with_npu(smi=first_row_only)).severity is SKIP


def test_hugepages_of_a_310p() -> None:
    assert only("NPU-HUGEPAGES", with_npu(smi=SMI["310p3-hugepages"])).severity is WARN
    assert only("NPU-HUGEPAGES", with_npu(smi=SMI["310p3-duo"])).severity is INFO
    assert only("NPU-HUGEPAGES", with_npu()).severity is SKIP


@pytest.mark.parametrize(("degrees", "severity"), [("49", INFO), ("80", INFO), ("81", WARN), ("- ", SKIP)])
def test_temperature(degrees: str, severity: Severity) -> None:
    text = TABLE.replace("91.1        49", f"91.1        {degrees}")
    finding = only("NPU-TEMP", with_npu(smi=text))
    assert finding.severity is severity
    assert finding.doubts == ()
    assert severity is not INFO or "91.1 W" in finding.cause


@pytest.mark.parametrize(
    ("field", "count", "expected"),
    [
        ("HBM Double Bit Error Count", 1, [FAIL]),
        ("DDR Double Bit Error Count", 1, [FAIL]),
        ("HBM Double Bit Isolated Pages Count", 3, [WARN]),
        ("HBM Single Bit Error Count", 9, [INFO]),
    ],
)
def test_memory_errors(field: str, count: int, expected: list[Severity]) -> None:
    text = SMI["ecc"] + f"\t{field}   : {count}\n"
    seen = with_answer(with_npu(), "npu-smi info -t ecc -i 0", text)
    assert [finding.severity for finding in findings("NPU-ECC", seen)] == expected


def test_processes_of_others() -> None:
    finding = only("NPU-PROC", with_npu(smi=TABLE + SMI["910b2c-processes"]))
    assert finding.severity is WARN
    assert "python3.8 (pid 124528) 17400 MB on NPU 0" in finding.cause
    assert "-p 124528" in finding.command


# --- the probe


SIXTEEN = "".join(
    f"| {card} Ascend910 | OK | 178.8 36 0 / 0 |\n| {die} {2 * card + die} | 0000:9D:00.0 | 0 0 / 0 3397 / 65536 |\n"
    for card in range(8)
    for die in (0, 1)
)


def test_each_card_is_asked_once(machine: FakeMachine) -> None:
    healthy(machine)
    machine.npu_smi(f'case "$*" in\n"info") cat <<"END"\n{SIXTEEN}END\n;;\n*) echo "asked : $*";;\nesac\n')
    answers = machine.snapshot().commands
    asked = sorted(line for line in answers if line.startswith("npu-smi"))
    kinds = ("board", "ecc", "health")
    expected = [
        "npu-smi info",
        "npu-smi info -m",
        *(f"npu-smi info -t {kind} -i {card}" for kind in kinds for card in range(8)),
    ]
    assert asked == sorted(expected)
    assert answers["npu-smi info -t ecc -i 7"].output == "asked : info -t ecc -i 7\n"


def test_a_card_that_does_not_answer_is_asked_no_more(machine: FakeMachine) -> None:
    healthy(machine)
    machine.npu_smi(f'case "$*" in\n"info") cat <<\'END\'\n{TABLE}END\n;;\n*board*) sleep 60;;\nesac\n')
    answers = machine.snapshot(command_seconds=0.5).commands
    assert answers["npu-smi info -t board -i 0"].outcome == "timeout"
    assert "npu-smi info -t health -i 0" not in answers


def test_addresses_and_serials_of_boards_stay_here(machine: FakeMachine) -> None:
    healthy(machine)
    board = "Serial Number : 2102313NKD10PA000123\\nCompatibility : OK"
    machine.npu_smi(f"case \"$*\" in\n\"info\") cat <<'END'\n{TABLE}END\n;;\n*board*) printf '{board}\\n';;\nesac\n")
    text = machine.snapshot().to_json()
    assert "NKD10PA" not in text
    assert "Compatibility : OK" in json.loads(text)["commands"]["npu-smi info -t board -i 0"]["output"]


def test_on_the_machine_itself_the_loader_is_asked(machine: FakeMachine) -> None:
    machine.npu()
    place = Place(Tree(str(machine.root)), machine.environ, [], live=True, command_seconds=30, import_seconds=30)
    facts = probe.look(place)
    assert facts["loads"]["libascend_hal.so"].outcome == "failed", "the made-up library lies where no loader looks"
    assert f"{ASCEND}/driver/lib64/driver/libascend_hal.so" in facts["paths"]
    assert probe.look(replace(place, live=False))["loads"] == {}
