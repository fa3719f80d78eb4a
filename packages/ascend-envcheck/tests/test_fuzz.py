"""Mutated machines and logs: no traceback, always a finding or a SKIP of each rule.

A few hundred of each run here; ``nox -s envcheck-fuzz`` runs 10,000.
"""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from fake_machine import FakeMachine, healthy
from test_scenarios import SCENARIOS

from ascend_envcheck import RULES, Report, Severity, Snapshot, SnapshotError, check, explain
from ascend_envcheck.messages import LANGUAGES, Message
from ascend_envcheck.render import text

ROUNDS = int(os.environ.get("ENVCHECK_FUZZ_ROUNDS", "300"))
LOGS = sorted((Path(__file__).parent / "logs").rglob("*.log"))

JUNK = (
    "",
    "\r\n",
    "|",
    " | OK ",
    "\x00",
    "\x1b[31m",
    "版本",
    "=",
    "[",
    "9" * 40,
    "-1",
    "NA",
    "{",
    "1.2.3",
    "\ud800",
    ",,",
)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Snapshots as JSON values: some machines of the scenarios, seen by the real probes."""
    built = []
    for number, scenario in enumerate(SCENARIOS[::6]):
        machine = FakeMachine(tmp_path_factory.mktemp(f"machine{number}"))
        scenario.build(machine)
        built.append(json.loads(machine.snapshot().to_json()))
    machine = FakeMachine(tmp_path_factory.mktemp("healthy"))
    healthy(machine)
    return [*built, json.loads(machine.snapshot().to_json())]


def spoiled(value: str, rng: random.Random) -> str:
    """A text with a piece cut out, put in, doubled, or with other line ends."""
    at = rng.randrange(len(value) + 1)
    to = min(len(value), at + rng.randrange(1, 12))
    return rng.choice(
        (
            value[:at],
            value[:at] + value[to:],
            value[:at] + rng.choice(JUNK) + value[at:],
            value[:at] + value[at:to] * 2 + value[to:],
            value.replace("\n", "\r\n"),
            value.replace("|", "| 1 |", rng.randrange(1, 9)),
            value.replace(rng.choice("0123456789."), rng.choice(JUNK)),
        )
    )


def mutate(facts: Any, rng: random.Random) -> None:
    """Spoil one leaf of a snapshot, or take away a key of a mapping."""
    at: Any = facts
    while True:
        key = rng.choice(sorted(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if not isinstance(at[key], (dict, list)) or not at[key]:
            break
        at = at[key]
    if isinstance(at[key], str):
        at[key] = spoiled(at[key], rng)
    elif isinstance(at[key], bool) or at[key] is None:
        at[key] = rng.choice((True, False, None))
    elif isinstance(at[key], int):
        at[key] = rng.choice((-1, 0, 1, 10**20, at[key]))
    elif isinstance(at, dict) and rng.random() < 0.5:
        del at[key]


def is_sound(report: Report) -> None:
    """Nothing a rule said of a machine was a crash, and each rule said something that can be read."""
    assert {finding.id for finding in report.findings} == {rule.id for rule in RULES}
    for finding in report.findings:
        assert "itself failed" not in finding.cause, finding
        assert isinstance(finding.cause, Message), f"{finding.id} has no Chinese: {finding.cause}"
        assert finding.severity is not Severity.FAIL or (finding.command and finding.source), finding
    assert report.verdicts


def test_mutated_machines(machines: list[Any]) -> None:
    refused = 0
    for number in range(ROUNDS):
        rng = random.Random(number)
        facts = copy.deepcopy(rng.choice(machines))
        for _ in range(rng.randrange(1, 6)):
            mutate(facts, rng)
        try:
            snapshot = Snapshot.from_json(json.dumps(facts))
        except SnapshotError:
            refused += 1
            continue
        report = check(snapshot)
        is_sound(report)
        for language in LANGUAGES:
            assert all(line.isprintable() for line in text.render(report, snapshot, RULES, language).split("\n"))
    assert refused < ROUNDS / 2, "most mutations leave a snapshot"


def test_mutated_logs() -> None:
    assert LOGS
    for number in range(ROUNDS):
        rng = random.Random(number)
        log = rng.choice(LOGS).read_text(encoding="utf-8", errors="replace")
        for _ in range(rng.randrange(1, 6)):
            log = spoiled(log, rng)
        explain(log)
