"""The table of environment variables is sound, and each documented conflict is found where it is, and only there."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from fake_machine import TABLE, FakeMachine, healthy
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_envcheck import Finding, Severity, Snapshot, check
from ascend_envcheck.messages import CHINESE, Message, told
from ascend_envcheck.rules.environment import COMPONENTS
from ascend_envcheck.rules.variable_conflicts import TOPICS
from ascend_envcheck.rules.variables import RULES
from ascend_envcheck.snapshot import CommandFacts, Distribution, HostFacts
from ascend_envcheck.variables import Variable, names, options_of, sections, variables, whole_number
from ascend_envcheck.versions import release

FAIL, WARN, INFO, SKIP = Severity.FAIL, Severity.WARN, Severity.INFO, Severity.SKIP
A2, A3, DUO = "910B2", "910_9392", "310P3"
HAN = re.compile("[\u4e00-\u9fff]")


def machine_with(
    variables: dict[str, str] | None = None,
    *,
    npu: str = "",
    count: int = 8,
    torch_npu: str = "",
    cann: str = "",
    driver: str = "",
) -> Snapshot:
    """A snapshot with variables, and where they are given an NPU and versions."""
    home = "/usr/local/Ascend/cann"
    nodes = [*(f"/dev/davinci{number}" for number in range(count)), "/dev/davinci_manager"] if npu else []
    files = {f"{home}/runtime/version.info": f"version_dir={cann}"} if cann else {}
    if driver:
        files["/usr/local/Ascend/driver/version.info"] = f"Version={driver}\n"
    return replace(
        Snapshot(),
        variables=variables or {},
        devices=dict.fromkeys(nodes, "rw"),
        commands={"npu-smi info": CommandFacts("ok", output=TABLE.replace("910B2", npu))} if npu else {},
        distributions={"torch_npu": Distribution(torch_npu)} if torch_npu else {},
        cann_homes=(home,) if cann else (),
        files=files,
        host=HostFacts(live=True, cpus=192),
    )


def told_by(rule: str, snapshot: Snapshot) -> list[Finding]:
    return list(check(snapshot, only=[rule], rules=RULES).findings)


def worst(snapshot: Snapshot, rule: str) -> Severity:
    return told_by(rule, snapshot)[0].severity


# --- the table ---


@pytest.mark.parametrize("variable", variables().values(), ids=lambda variable: variable.name)
def test_every_row(variable: Variable) -> None:
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+", variable.name)
    for value in (variable.default, variable.train, variable.infer):
        assert not value or variable.allows(value), f"{variable.name}={value}"
        assert re.fullmatch(r"[\w:.,=~/-]*", value), "exported as it stands, in every shell"
    assert variable.legal
    assert variable.source
    assert variable.confidence in {"official", "code", "field"}
    assert variable.why
    row = sections("variables")[variable.name]
    wanted = any(row.get(key) for key in row if key.partition(".")[0] in {"train", "infer", "fill"})
    assert bool(variable.advice) == wanted
    assert variable.advice in {"", "walkthrough", "official", "scripts", "judgement"}
    for text in (variable.why, variable.pitfalls, variable.fill):
        assert not text or HAN.search(told(text, CHINESE))
        assert "\n" not in text
    assert not variable.instead or variable.instead in variables()


@pytest.mark.parametrize("soc", ["ascend910", "ascend910b", "ascend910_93", "ascend310p", "ascend950"])
def test_rows_on_a_soc(soc: str) -> None:
    for variable in variables(soc).values():
        for value in (variable.default, variable.train, variable.infer):
            assert not value or variable.allows(value), f"{variable.name}={value} on {soc}"


def test_keys_and_versions_are_spelled_right() -> None:
    keys = {"legal", "pattern", "range", "illegal", "default", "train", "infer", "advice", "fill", "why", "pitfalls"}
    keys |= {"tasks", "since", "deprecated", "removed", "instead", "source", "confidence"}
    for name, row in sections("variables").items():
        assert {key.partition(".")[0] for key in row} <= keys, name
        re.compile(row.get("pattern", ""))
        assert not row.get("range") or re.fullmatch(r"\d+\.\.\d*", row["range"])
        for key in ("since", "deprecated", "removed"):
            for part in filter(None, row.get(key, "").split(", ")):
                component, version = part.split(" ")
                assert component in COMPONENTS
                assert release(version) is not None
        assert name.partition(":")[0] in variables()


def test_names_for_the_probe() -> None:
    assert len(set(names())) == len(names())
    assert {*variables(), "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "LD_LIBRARY_PATH", "ASCEND_HOME_PATH"} <= {
        *names()
    }


# The documented legal values, and their nearest illegal neighbours.
@pytest.mark.parametrize(
    ("name", "legal", "illegal"),
    [
        ("TASK_QUEUE_ENABLE", ["0", "1", "2"], ["3", "", "true", "01"]),
        ("CPU_AFFINITY_CONF", ["1", "2,force:1", "1,npu0:0-1,npu1:2-3", "2,npu_affine:1"],
         ["3", "force:1", "1;npu0:0-1"]),
        ("PYTORCH_NPU_ALLOC_CONF", ["expandable_segments:True", "max_split_size_mb:21,garbage_collection_threshold:0.6",
                                    "page_size:1g", "roundup_power2_divisions:[256:1,512:2]"],
         ["expandable_segments=True", "expandable_segments:true", "max_split_size_mb:20",
          "garbage_collection_threshold:1.0", "garbage_collection_threshold:0.0", "page_size:2m", "speed:high"]),
        ("HCCL_CONNECT_TIMEOUT", ["120", "7200"], ["119", "7201", "1200s", "-1", "9" * 40]),
        ("HCCL_EXEC_TIMEOUT", ["0", "1836", "2147483647"], ["2147483648", "1836.5"]),
        ("HCCL_RDMA_TC", ["0", "4", "132", "252"], ["2", "133", "256", "-4"]),
        ("HCCL_RDMA_SL", ["0", "7"], ["8"]),
        ("HCCL_IF_BASE_PORT", ["1024", "65520"], ["1023", "65521"]),
        ("HCCL_IF_IP", ["10.10.10.1", "ip4-1f3a9c27", "ip6-1f3a9c27", "fe80::1"], ["eth0", "10.10.10"]),
        ("HCCL_SOCKET_IFNAME", ["eth,enp", "^eth", "=eth0,eth1", "^=eth0", "bond0.100"], ["eth 0", "=", "eth0;eth1"]),
        ("HCCL_SOCKET_FAMILY", ["AF_INET", "AF_INET6"], ["AF_INET4"]),
        ("HCCL_OP_RETRY_ENABLE", ["L1:0,L2:1"], ["L1:2,L2:0", "1"]),
        ("HCCL_DETERMINISTIC", ["false", "true", "strict"], ["True"]),
        ("HCCL_ALGO", ["level0:NA;level1:H-D_R"], ["ring"]),
        ("HCCL_DFS_CONFIG", ["cluster_heartbeat:on,stuck_detection:off"], ["cluster_heartbeat:maybe"]),
        ("HCCL_LOGIC_SUPERPOD_ID", ["a" * 127], ["a" * 128]),
        ("STREAMS_PER_DEVICE", ["8", "32"], ["16"]),
        ("NPU_ASD_CONFIG", ["enable:true,with_checksum:true,cooldown:5"], ["on"]),
        ("ASCEND_MODULE_LOG_LEVEL", ["HCCL=1:GE=0"], ["HCCL:1", "HCCL=1,GE=0"]),
        ("ASCEND_VISIBLE_DEVICES", ["0,1", "0-3", "0-1,4", "void"], ["0,"]),
        ("ASCEND_RUNTIME_OPTIONS", ["NODRV", "NODRV,VIRTUAL"], ["nodrv"]),
        ("ACLNN_CACHE_LIMIT", ["1", "10000000"], ["0", "10000001"]),
        ("TOKENIZERS_PARALLELISM", ["true", "False"], ["maybe"]),
        ("MINDIE_SD_FA_TYPE", ["ascend_laser_attention"], ["laser"]),
        ("MINDIE_LOG_LEVEL", ["info", "llm:error;sd:debug"], ["verbose"]),
    ],
)  # fmt: skip
def test_legal_values(name: str, legal: list[str], illegal: list[str]) -> None:
    variable = variables()[name]
    assert [value for value in legal if not variable.allows(value)] == []
    assert [value for value in illegal if variable.allows(value)] == []


# HCCL's document on HCCL_OP_EXPANSION_MODE, table of products; HCCL_RDMA_TIMEOUT likewise.
@pytest.mark.parametrize(
    ("soc", "name", "value", "allowed"),
    [
        ("ascend910b", "HCCL_OP_EXPANSION_MODE", "HOST_TS", True),
        ("ascend910b", "HCCL_OP_EXPANSION_MODE", "CCU_MS", False),
        ("ascend910_93", "HCCL_OP_EXPANSION_MODE", "AI_CPU", True),
        ("ascend910_93", "HCCL_OP_EXPANSION_MODE", "HOST", False),
        ("ascend950", "HCCL_OP_EXPANSION_MODE", "CCU_SCHED", True),
        ("ascend310p", "HCCL_OP_EXPANSION_MODE", "AIV", False),
        ("ascend910b", "HCCL_RDMA_TIMEOUT", "21", False),
        ("ascend910", "HCCL_RDMA_TIMEOUT", "21", True),
        ("ascend950", "HCCL_RDMA_TIMEOUT", "31", True),
        ("ascend910", "HCCL_EXEC_TIMEOUT", "17341", False),
        ("ascend910b", "HCCL_EXEC_TIMEOUT", "17341", True),
    ],
)
def test_what_is_legal_depends_on_the_npu(soc: str, name: str, value: str, allowed: bool) -> None:
    assert variables(soc)[name].allows(value) is allowed


def test_options() -> None:
    assert options_of("a:1,b:[x:1,y:2],c") == {"a": "1", "b": "[x:1,y:2]", "c": ""}
    assert options_of("") == {}
    assert options_of("," * 100_000 + "[" * 100_000) == {}
    assert [whole_number(text) for text in ("0", "18", "", "-1", "1.5", "٣", "9" * 19)] == [0, 18, *[None] * 5]


# --- single values ---


@pytest.mark.parametrize(
    ("setting", "npu", "severity", "words"),
    [
        ({"HCCL_CONNECT_TIMEOUT": "60"}, A2, FAIL, "120..7200"),
        ({"TASK_QUEUE_ENABLE": "3"}, A2, WARN, "0 | 1 | 2"),
        ({"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:10"}, A2, FAIL, "max_split_size_mb:10 is not legal"),
        ({"PYTORCH_NPU_ALLOC_CONF": "of_tomorrow:1"}, A2, WARN, "not known: of_tomorrow"),
        ({"HCCL_OP_EXPANSION_MODE": "HOST"}, A3, WARN, "the default takes its place"),
        ({"HCCL_OP_EXPANSION_MODE": "HOST"}, "950PR", FAIL, "the program stops"),
        ({"HCCL_OP_EXPANSION_MODE": "HOST"}, A2, INFO, "1 variable(s)"),
        ({"HCCL_IF_IP": "ip4-1f3a9c27", "TOKENIZERS_PARALLELISM": "***"}, A2, INFO, "1 variable(s)"),
        ({}, A2, SKIP, "none of the variables"),
    ],
)
def test_values(setting: dict[str, str], npu: str, severity: Severity, words: str) -> None:
    (finding,) = told_by("ENV-VALUE", machine_with(setting, npu=npu))
    assert finding.severity is severity
    assert words in finding.cause
    assert finding.blocks == (("npu",) if severity is FAIL else ())


def test_a_value_of_one_task_is_of_no_account_to_the_other() -> None:
    report = check(machine_with({"MINDIE_SD_FA_TYPE": "laser"}, npu=A2), only=["ENV-VALUE"], rules=RULES)
    assert report.findings[0].tasks == ("infer",)


# --- conflicts ---

CONFLICTS = [
    ("ENV-QUEUE", {"ASCEND_LAUNCH_BLOCKING": "1", "TASK_QUEUE_ENABLE": "2"}, {}, WARN),
    ("ENV-QUEUE", {"PER_STREAM_QUEUE": "1", "TASK_QUEUE_ENABLE": "0"}, {}, WARN),
    ("ENV-QUEUE", {"PER_STREAM_QUEUE": "1", "TASK_QUEUE_ENABLE": "2"}, {}, INFO),
    ("ENV-QUEUE", {"PER_STREAM_QUEUE": "1"}, {}, INFO),  # the default of the queue is 1
    ("ENV-ALLOC", {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:32"}, {}, FAIL),
    ("ENV-ALLOC", {"PYTORCH_NPU_ALLOC_CONF": "garbage_collection_threshold:0.8,expandable_segments:True"}, {}, FAIL),
    ("ENV-ALLOC", {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:False,max_split_size_mb:32"}, {}, INFO),
    ("ENV-ALLOC", {"PYTORCH_NPU_ALLOC_CONF": "pinned_mem_register:True,pin_memory_expandable_segments:True"}, {}, FAIL),
    ("ENV-ALLOC", {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g,expandable_segments:True"}, {}, INFO),
    ("ENV-ALLOC", {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}, {"cann": "8.0.0"}, WARN),
    ("ENV-ALLOC", {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}, {"cann": "8.1.RC1", "driver": "25.0.RC1"}, INFO),
    ("ENV-ALLOC", {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}, {"driver": "24.1.0"}, WARN),
    ("ENV-ALLOC", {"PYTORCH_NPU_ALLOC_CONF": "pinned_mem_register:True"}, {"torch_npu": "2.6.0"}, WARN),  # 7.1.0
    ("ENV-ALLOC", {"TORCH_HCCL_ZERO_COPY": "1"}, {}, WARN),
    ("ENV-ALLOC-NAMES", {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_NPU_ALLOC_CONF": "a:1"}, {"torch_npu": "2.6.0"}, INFO),
    (
        "ENV-ALLOC-NAMES",
        {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_NPU_ALLOC_CONF": "a:1"},
        {"torch_npu": "2.12.0.post3"},
        FAIL,
    ),
    (
        "ENV-ALLOC-NAMES",
        {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_NPU_ALLOC_CONF": "a:1"},
        {"torch_npu": "2.7.1.post11"},
        INFO,
    ),
    ("ENV-ALLOC-NAMES", {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_NPU_ALLOC_CONF": "a:1"}, {}, INFO),
    ("ENV-HCCL-TIMEOUTS", {"HCCL_CONNECT_TIMEOUT": "3600"}, {}, WARN),  # above the default of 1836
    ("ENV-HCCL-TIMEOUTS", {"HCCL_CONNECT_TIMEOUT": "1200", "HCCL_EXEC_TIMEOUT": "1200"}, {}, WARN),
    ("ENV-HCCL-TIMEOUTS", {"HCCL_CONNECT_TIMEOUT": "1200"}, {}, INFO),
    ("ENV-HCCL-TIMEOUTS", {"HCCL_CONNECT_TIMEOUT": "7200", "HCCL_EXEC_TIMEOUT": "0"}, {}, INFO),  # 0: for ever
    ("ENV-HCCL-TIMEOUTS", {"HCCL_EXEC_TIMEOUT": "3600", "HCCL_EVENT_TIMEOUT": "1868"}, {}, WARN),
    ("ENV-HCCL-TIMEOUTS", {"HCCL_EXEC_TIMEOUT": "0", "HCCL_EVENT_TIMEOUT": "1868"}, {}, WARN),
    ("ENV-HCCL-TIMEOUTS", {"HCCL_EXEC_TIMEOUT": "3600", "HCCL_EVENT_TIMEOUT": "0"}, {}, INFO),
    ("ENV-HCCL-TIMEOUTS", {"HCCL_EXEC_TIMEOUT": "1200", "HCCL_OP_EXPANSION_MODE": "AIV"}, {}, WARN),
    ("ENV-HCCL-TIMEOUTS", {"HCCL_EXEC_TIMEOUT": "1091", "HCCL_OP_EXPANSION_MODE": "AIV"}, {}, INFO),
    ("ENV-EXPANSION", {"HCCL_OP_RETRY_ENABLE": "L1:1,L2:0", "HCCL_OP_EXPANSION_MODE": "AIV"}, {}, WARN),
    ("ENV-EXPANSION", {"HCCL_OP_RETRY_ENABLE": "L1:1,L2:0"}, {"npu": A2}, WARN),  # its default is HOST
    ("ENV-EXPANSION", {"HCCL_OP_RETRY_ENABLE": "L1:1,L2:0"}, {"npu": A3}, INFO),  # its default is AI_CPU
    ("ENV-EXPANSION", {"HCCL_DETERMINISTIC": "true", "HCCL_OP_EXPANSION_MODE": "AIV"}, {}, INFO),
    ("ENV-INTRA-LINK", {"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "1"}, {}, FAIL),
    ("ENV-INTRA-LINK", {"HCCL_INTRA_PCIE_ENABLE": "0"}, {}, FAIL),
    ("ENV-INTRA-LINK", {"HCCL_INTRA_ROCE_ENABLE": "0"}, {}, FAIL),
    ("ENV-INTRA-LINK", {"HCCL_INTRA_PCIE_ENABLE": "0", "HCCL_INTRA_ROCE_ENABLE": "0"}, {}, INFO),
    ("ENV-INTRA-LINK", {"HCCL_INTRA_PCIE_ENABLE": "0", "HCCL_INTRA_ROCE_ENABLE": "1"}, {}, INFO),
    ("ENV-INTRA-LINK", {"HCCL_INTRA_ROCE_ENABLE": "1"}, {}, INFO),
    ("ENV-SLOG", {"ASCEND_SLOG_PRINT_TO_STDOUT": "1"}, {}, WARN),
    ("ENV-SLOG", {"ASCEND_SLOG_PRINT_TO_STDOUT": "1", "ASCEND_LOG_PRINT_TO_STDOUT": "0"}, {}, INFO),
    ("ENV-SLOG", {"ASCEND_GLOBAL_LOG_LEVEL": "1"}, {}, INFO),
    ("ENV-INF-NAN", {"INF_NAN_MODE_ENABLE": "0"}, {"npu": A2}, FAIL),
    ("ENV-INF-NAN", {"INF_NAN_MODE_ENABLE": "0"}, {"npu": A3}, FAIL),
    ("ENV-INF-NAN", {"INF_NAN_MODE_ENABLE": "0"}, {"npu": DUO}, INFO),
    ("ENV-INF-NAN", {"INF_NAN_MODE_ENABLE": "0"}, {}, WARN),
    ("ENV-INF-NAN", {"INF_NAN_MODE_ENABLE": "0", "INF_NAN_MODE_FORCE_DISABLE": "1"}, {"npu": A2}, WARN),
    ("ENV-MAX-CONNECTIONS", {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, {}, WARN),
    ("ENV-MAX-CONNECTIONS", {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, {}, INFO),
    ("ENV-ASD", {"NPU_ASD_ENABLE": "1"}, {"torch_npu": "2.6.0"}, WARN),
    ("ENV-ASD", {"NPU_ASD_CONFIG": "enable:true"}, {"torch_npu": "2.6.0"}, INFO),
    ("ENV-ASD", {"NPU_ASD_CONFIG": "enable:true"}, {"torch_npu": "2.1.0.post12"}, WARN),  # 7.0.0
    ("ENV-ASD", {"NPU_ASD_ENABLE": "1"}, {"torch_npu": "2.1.0.post12"}, INFO),
    ("ENV-ASD", {"NPU_ASD_ENABLE": "1"}, {}, INFO),
    ("ENV-ASD", {"NPU_ASD_ENABLE": "0"}, {"torch_npu": "2.6.0"}, INFO),  # off is off
    ("ENV-DEPRECATED", {"ASCEND_SLOG_PRINT_TO_STDOUT": "0"}, {"cann": "9.2.0"}, INFO),
    ("ENV-DEPRECATED", {"ASCEND_LOG_PRINT_TO_STDOUT": "1"}, {"cann": "8.2.RC1"}, WARN),
    ("ENV-DEPRECATED", {"ASCEND_LOG_PRINT_TO_STDOUT": "0"}, {"cann": "8.2.RC1"}, INFO),  # which is the default
    ("ENV-DEPRECATED", {"TASK_QUEUE_ENABLE": "2"}, {"cann": "8.2.RC1"}, INFO),
    ("ENV-VISIBLE", {"ASCEND_RT_VISIBLE_DEVICES": "0,1,3"}, {"npu": A2}, INFO),
    ("ENV-VISIBLE", {"ASCEND_RT_VISIBLE_DEVICES": "0, 1"}, {"npu": A2}, FAIL),
    ("ENV-VISIBLE", {"ASCEND_RT_VISIBLE_DEVICES": "0-3"}, {"npu": A2}, FAIL),
    ("ENV-VISIBLE", {"ASCEND_RT_VISIBLE_DEVICES": "1,0"}, {"npu": A2}, FAIL),
    ("ENV-VISIBLE", {"ASCEND_RT_VISIBLE_DEVICES": "1,1"}, {"npu": A2}, FAIL),
    ("ENV-VISIBLE", {"ASCEND_RT_VISIBLE_DEVICES": "1,3,8"}, {"npu": A2}, FAIL),
    ("ENV-OMP", {"TORCHELASTIC_RUN_ID": "none"}, {}, INFO),
    ("ENV-OMP", {"OMP_NUM_THREADS": "10", "LOCAL_WORLD_SIZE": "8"}, {}, INFO),
    ("ENV-OMP", {"OMP_NUM_THREADS": "64", "LOCAL_WORLD_SIZE": "8"}, {}, WARN),  # 512 threads, 192 cores
]


@pytest.mark.parametrize(("rule", "setting", "machine", "severity"), CONFLICTS)
def test_conflicts(rule: str, setting: dict[str, str], machine: dict[str, str], severity: Severity) -> None:
    assert worst(machine_with(setting, **machine), rule) is severity  # type: ignore[arg-type]


def test_every_topic_has_a_conflict_that_is_tested() -> None:
    tested = {rule for rule, _, _, severity in CONFLICTS if severity in (FAIL, WARN)}
    assert {topic.id for topic in TOPICS} <= tested


def test_every_conflict_has_its_texts() -> None:
    table = sections("conflicts")
    assert {f"{topic.id}.{name}" for topic in TOPICS for name in topic.conflicts} == {*table}
    for name, row in table.items():
        assert HAN.search(row["cause.zh"]), name
        placeholders = [set(re.findall(r"\{(\w*)\}", row[key])) for key in ("cause", "cause.zh")]
        assert placeholders[0] == placeholders[1] <= {*variables()}, name
        assert row["severity"] == "INFO" or row["command"], name
        assert row["severity"] != "FAIL" or row["blocks"], name


def test_what_is_left_of_the_visible_devices_is_said() -> None:
    # The vendor's own example: of "1,3,8" on eight devices, 1 and 3 are read.
    (finding,) = told_by("ENV-VISIBLE", machine_with({"ASCEND_RT_VISIBLE_DEVICES": "1,3,8"}, npu=A2))
    assert "there are NPUs 0 to 7 only" in finding.cause
    assert "2 NPU(s) are left" in finding.cause
    assert finding.command == "export ASCEND_RT_VISIBLE_DEVICES=1,3"


def test_device_ids_count_from_0_in_a_container() -> None:
    snapshot = machine_with({"ASCEND_RT_VISIBLE_DEVICES": "4,5"}, npu=A2, count=2)
    (finding,) = told_by("ENV-VISIBLE", replace(snapshot, host=HostFacts(live=True, container="docker")))
    assert "in this container the ids count from 0 to 1" in finding.cause


# --- network, library path ---

SEVERAL = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("setting", "states", "severity"),
    [
        (SEVERAL, {"eth0": "up", "eth1": "up", "lo": "unknown"}, WARN),
        (SEVERAL, {"eth0": "up", "docker0": "up", "lo": "unknown", "eth1": "down"}, INFO),
        ({**SEVERAL, "HCCL_SOCKET_IFNAME": "eth0"}, {"eth0": "up", "eth1": "up"}, INFO),
        ({**SEVERAL, "HCCL_IF_IP": "ip4-1f3a9c27"}, {"eth0": "up", "eth1": "up"}, INFO),
        ({}, {"eth0": "up", "eth1": "up"}, SKIP),
        ({"HCCL_WHITELIST_DISABLE": "0"}, {"eth0": "up"}, WARN),
        ({"HCCL_WHITELIST_DISABLE": "0", "HCCL_WHITELIST_FILE": "/etc/hosts.json"}, {"eth0": "up"}, SKIP),
    ],
)
def test_socket(setting: dict[str, str], states: dict[str, str], severity: Severity) -> None:
    snapshot = replace(machine_with(setting, npu=A2), host=HostFacts(live=True, interfaces=states))
    assert worst(snapshot, "ENV-SOCKET") is severity


def test_library_path(machine: FakeMachine) -> None:
    healthy(machine)
    assert worst(machine.snapshot(), "ENV-LIBRARY-PATH") is INFO
    machine.environ["LD_LIBRARY_PATH"] += ":/nowhere"
    (finding,) = told_by("ENV-LIBRARY-PATH", machine.snapshot())
    assert (finding.severity, "do not exist: /nowhere" in finding.cause) == (INFO, True)
    machine.environ["LD_LIBRARY_PATH"] += f":{machine.new_cann('8.5.0')}/lib64"
    (finding,) = told_by("ENV-LIBRARY-PATH", machine.snapshot())
    assert finding.severity is WARN
    assert "ascend-toolkit/8.2.RC1, /usr/local/Ascend/cann-8.5.0" in finding.cause


# --- the whole ---


def test_a_healthy_machine_and_a_laptop_have_nothing_to_fear(machine: FakeMachine) -> None:
    healthy(machine)
    for snapshot in (machine.snapshot(), Snapshot(), machine_with({"OMP_NUM_THREADS": "4"})):
        assert {finding.severity for finding in check(snapshot, rules=RULES).findings} <= {INFO, SKIP}


# The exports of MindSpeed MM's script that fine-tunes Qwen2.5-VL-7B.
SCRIPT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
    "ASCEND_GLOBAL_LOG_LEVEL": "3",
    "TASK_QUEUE_ENABLE": "2",
    "COMBINED_ENABLE": "1",
    "CPU_AFFINITY_CONF": "1",
    "HCCL_CONNECT_TIMEOUT": "1200",
    "NPU_ASD_ENABLE": "0",
    "ASCEND_LAUNCH_BLOCKING": "0",
    "ACLNN_CACHE_LIMIT": "100000",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
}


def test_the_environment_of_the_vendors_own_script_is_in_order(machine: FakeMachine) -> None:
    healthy(machine)
    machine.environ.update(SCRIPT)
    report = check(machine.snapshot(), rules=RULES)
    assert [finding for finding in report.findings if finding.severity in (FAIL, WARN)] == []


def test_the_profile_tells_what_is_not_set() -> None:
    train, infer = told_by("ENV-PROFILE", machine_with(npu=A2))
    assert (train.tasks, infer.tasks) == (("train",), ("infer",))
    assert "TASK_QUEUE_ENABLE=2" in train.cause
    assert "HCCL_CONNECT_TIMEOUT=1200" in train.cause
    assert train.command == 'eval "$(ascend-envcheck env --profile train)"'
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in infer.cause
    assert worst(machine_with(), "ENV-PROFILE") is SKIP


def test_what_the_profile_recommends_is_content_with_itself() -> None:
    for task in ("train", "infer"):
        wanted = {name: row.recommended(task) for name, row in variables("ascend910b").items() if row.recommended(task)}
        report = check(machine_with(wanted, npu=A2), rules=RULES, profile=task)
        assert [finding for finding in report.findings if finding.severity in (FAIL, WARN)] == []


NAME = st.sampled_from([*names(), "english", "rule", ""])
VALUE = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["0", "1", "2", "***", "AIV", "expandable_segments:True,page_size:1g", "0,1,x", "{", "9" * 30]),
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAME, VALUE, max_size=8), st.sampled_from(["", A2, A3, "950PR"]))
def test_no_environment_is_too_odd(setting: dict[str, str], npu: str) -> None:
    report = check(machine_with(setting, npu=npu, cann="9.2.0"), rules=RULES)
    assert {finding.id for finding in report.findings} == {rule.id for rule in RULES}
    for finding in report.findings:
        assert "itself failed" not in finding.cause
        assert isinstance(finding.cause, Message)
        assert finding.severity is not FAIL or (finding.command and finding.source)
