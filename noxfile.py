"""The only task runner: `nox -l` lists the sessions, `nox` runs what a change must pass, `nox -s demo` shows the house.

Four kinds of environments. `lint` and `docs` have nox's own. `demo`, `types` and `tests` share one that holds all
packages, installed in place. Each `isolated` session has its own, which holds one package as its user gets it. The two
`contract` sessions share one that holds what runs on accelerators, and the vendors' libraries. The last three kinds
are made anew when what is declared changes, and are used as they stand otherwise. pip decides what each of them holds;
what `types` and `tests` already have in that version is linked from there, not unpacked again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))

from house.boundaries import TEST_TOOLS, violations  # noqa: E402
from house.environment import CommandError, Environment, Recipe  # noqa: E402
from house.isolation import (  # noqa: E402
    ONE_THREAD,
    SIDE_BY_SIDE,
    everything_recipe,
    isolation_recipe,
    prepare_isolated,
    run_tests,
)
from house.tree import read_package, read_packages, siblings  # noqa: E402
from house.wheels import BUILD_TOOLS, build_wheels, wheel_names, wheel_problems  # noqa: E402

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests", "isolated", "npu-contract", "triton-contract"]

CONSTRAINTS = ROOT / "constraints" / "cpu.txt"
LIMITS = ("-c", str(CONSTRAINTS))
VENDORS = ("torch-npu", "mindiesd", "triton", "einops", "pyzmq")  # the last two: mindiesd imports them undeclared
ON_ACCELERATORS = ("dit-cache", "dit-fused-ops", "dit-ulysses", "mm-convert", "mm-datafmt", "mm-finetune", "wan-infer")
# What types and tests need beside the packages; peft is compared with.
TOOLS = (*TEST_TOOLS, *BUILD_TOOLS, "mypy", "nox", "tomli", "peft")
SETTINGS = ROOT / "pyproject.toml"
ENVIRONMENTS = ROOT / ".nox"
EVERYTHING = Environment(ENVIRONMENTS / "everything")
PACKAGES = read_packages(ROOT)
META = read_package(ROOT / "meta")

HELD_OUT_GROUP = "Which digit is this?"
HELD_OUT_ACCURACY = 0.90


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """A model learns to read digits, another shows them in motion; `-- FOLDER`: results there, not in demo-out."""
    out = _demo_folder(session)
    environment = _everything(session)
    session.env["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    for number, command in enumerate(_demo_chain(shlex.quote(str(out))), start=1):
        _demo_step(session, environment, number, command)
    session.log(f"the whole chain took {time.monotonic() - started:.0f} s")
    before, after = (_digit_accuracy(out / name) for name in ("before.json", "after.json"))
    session.log(f"held-out digits read correctly: {before:.1%} before training, {after:.1%} after")
    session.log(f"look at {out / 'report.html'}")
    if after < HELD_OUT_ACCURACY:
        session.error(f"{after:.1%} after training; at least {HELD_OUT_ACCURACY:.0%} was expected")


@nox.session
def lint(session: nox.Session) -> None:
    """Style of everything: ruff check and ruff format --check."""
    session.install(*LIMITS, "ruff", silent=True)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Types: mypy --strict over each package with its tests, then over the house around them."""
    python = str(_everything(session).python)
    # One run a package: equal names of test files in two packages are two modules of one name to mypy.
    for package in PACKAGES.values():
        session.run(python, "-m", "mypy", str(package.folder / "src"), str(package.tests), external=True)
    # The adapters' test across packages compares with mm-finetune's own reference.
    session.env["MYPYPATH"] = os.pathsep.join(("tests", "benchmarks", "packages/mm-finetune/tests"))
    session.run(python, "-m", "mypy", "noxfile.py", "tests", "benchmarks", "docs/conf.py", external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The tests across packages, in one environment with all; `-- packages/NAME …` runs others, without a wheel."""
    python = str(_everything(session).python)
    # Those of each package run once, in `isolated`, as its user gets it; those beneath these in the contract sessions.
    chosen = session.posargs or [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_*.py"))]
    session.run(python, "-m", "pytest", *SIDE_BY_SIDE, *chosen, external=True, env=ONE_THREAD)


@nox.session(name="envcheck-fuzz", venv_backend="none")
def envcheck_fuzz(session: nox.Session) -> None:
    """10,000 mutated machines and 10,000 mutated logs through ascend-envcheck: no traceback; minutes, not in CI."""
    python = str(_everything(session).python)
    tests = str(PACKAGES["ascend-envcheck"].tests / "test_fuzz.py")
    session.run(python, "-m", "pytest", tests, external=True, env={**ONE_THREAD, "ENVCHECK_FUZZ_ROUNDS": "10000"})


@nox.session(name="datafmt-fuzz", venv_backend="none")
def datafmt_fuzz(session: nox.Session) -> None:
    """20,000 mutated records through mm-datafmt, 27 killed conversions gone on with; minutes, not in CI."""
    python = str(_everything(session).python)
    tests = [str(PACKAGES["mm-datafmt"].tests / f"test_{name}.py") for name in ("fuzz", "killed")]
    numbers = {"DATAFMT_FUZZ_RECORDS": "20000", "DATAFMT_KILLS": "27"}
    session.run(python, "-m", "pytest", *tests, external=True, env={**ONE_THREAD, **numbers})


@nox.session(name="finetune-layouts", venv_backend="none")
def finetune_layouts(session: nox.Session) -> None:
    """mm-finetune against transformers, PEFT and itself: every layout, and all that CI leaves out; ten minutes."""
    python = str(_everything(session).python)
    tests = [str(PACKAGES["mm-finetune"].tests), "tests/test_lora_peft.py"]
    every = {**ONE_THREAD, "FINETUNE_LAYOUTS": "all"}
    session.run(python, "-m", "pytest", "-m", "", *SIDE_BY_SIDE, *tests, external=True, env=every)


@nox.session(venv_backend="none")
def wheels(session: nox.Session) -> None:
    """Build every distribution, its wheel also from its sdist; twine check --strict; look at the contents."""
    target = ROOT / "dist"
    problems: list[str] = []
    with _stopping(session):
        tools = _build_tools()
        build_wheels([*PACKAGES.values(), META], target / "direct", tools=tools)
        shutil.rmtree(target / "sdist", ignore_errors=True)
        for package in (*PACKAGES.values(), META):
            tools.run("-m", "build", "--no-isolation", "--outdir", target / "sdist", package.folder)
            wheel = f"{package.import_name}-{package.version}-py3-none-any.whl"
            problems += wheel_problems(target / "direct" / wheel, package)
            if wheel_names(target / "direct" / wheel) != wheel_names(target / "sdist" / wheel):
                problems.append(f"{wheel}: built from the sdist it holds other files than built from the tree")
        tools.run("-m", "twine", "check", "--strict", *sorted((target / "sdist").iterdir()))
    if problems:
        session.error("\n".join(problems))


@nox.session(venv_backend="none")
@nox.parametrize("package", [nox.param(name, id=name) for name in PACKAGES])
def isolated(session: nox.Session, package: str) -> None:
    """One package as its user has it: its wheel and what it declares, then its tests; `-- …` goes to pytest."""
    chosen = PACKAGES[package]
    if found := violations(chosen, PACKAGES):
        session.error("\n".join(found))
    environment = Environment(ENVIRONMENTS / f"isolated-env-{package}")
    built = ENVIRONMENTS / "wheels"
    with _stopping(session):
        build_wheels((chosen, *siblings(chosen, PACKAGES)), built, tools=_build_tools())
        recipe = isolation_recipe(chosen, PACKAGES, wheels=built, constraints=CONSTRAINTS, tools=TEST_TOOLS)
        prepare_isolated(environment, chosen, PACKAGES, wheels=built, recipe=recipe, lender=EVERYTHING)
        run_tests(environment, chosen, settings=SETTINGS, arguments=session.posargs)


@nox.session(venv_backend="none", name="npu-contract")
def npu_contract(session: nox.Session) -> None:
    """NPU code held against the real torch_npu on a stub of CANN: nothing runs on a device; `-- …` goes to pytest."""
    environment = _vendors(session)
    variables = session.run(str(environment.python), "tests/npu/stub_cann.py", "--env", silent=True, external=True)
    session.env.update(dict(line.split("=", 1) for line in str(variables).splitlines()))
    _contract(session, environment, "tests/npu")


@nox.session(venv_backend="none", name="triton-contract")
def triton_contract(session: nox.Session) -> None:
    """Our Triton kernels in Triton's interpreter, on CPU; `-- …` goes to pytest."""
    # Without its stub, torch_npu cannot be loaded, and torch would do so by itself.
    session.env.update({"TRITON_INTERPRET": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    _contract(session, _vendors(session), "tests/kernels")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as HTML in docs/_build/html; a warning or a dead reference is an error."""
    session.install(*LIMITS, "sphinx", "myst-parser", "furo", silent=True)
    session.run("sphinx-build", "-W", "-n", "-b", "html", "docs", "docs/_build/html")


@contextmanager
def _stopping(session: nox.Session) -> Iterator[None]:
    """A command that fails ends the session with its name and exit code, without a traceback."""
    try:
        yield
    except CommandError as error:
        session.error(str(error))


def _everything(session: nox.Session) -> Environment:
    """The environment of demo, types and tests: all packages in place with their extras save a device's, and the tools.

    What the session runs from here on runs as if it were activated.
    """
    with _stopping(session):
        EVERYTHING.prepare(everything_recipe(PACKAGES.values(), constraints=CONSTRAINTS, tools=TOOLS))
    session.env.update({**EVERYTHING.variables(), "PYTHONPATH": None})
    return EVERYTHING


def _vendors(session: nox.Session) -> Environment:
    """The environment of the contract sessions: what computes on accelerators, in place, and the vendors' libraries."""
    environment = Environment(ENVIRONMENTS / "vendors")
    present = [PACKAGES[name] for name in ON_ACCELERATORS]
    tools = (*TEST_TOOLS, *VENDORS)
    with _stopping(session):
        environment.prepare(everything_recipe(present, constraints=CONSTRAINTS, tools=tools), lender=EVERYTHING)
    session.env.update({**environment.variables(), "PYTHONPATH": None})
    return environment


def _contract(session: nox.Session, environment: Environment, folder: str) -> None:
    line = ("-m", "pytest", *SIDE_BY_SIDE, folder, *session.posargs)
    session.run(str(environment.python), *line, external=True, env=ONE_THREAD)


def _build_tools() -> Environment:
    environment = Environment(ENVIRONMENTS / "build-tools")
    recipe = Recipe(installs=((*LIMITS, *BUILD_TOOLS),), depends_on=(CONSTRAINTS.read_text("utf-8"),))
    environment.prepare(recipe, lender=EVERYTHING)
    return environment


def _demo_folder(session: nox.Session) -> Path:
    """Where the demo writes. Only demo-out is emptied: another folder may hold something that somebody wants."""
    if not session.posargs:
        shutil.rmtree("demo-out", ignore_errors=True)
        return Path("demo-out")
    if len(session.posargs) != 1 or session.posargs[0].startswith("-"):
        session.error(f"one folder is expected after --, not: {' '.join(session.posargs)}")
    out = Path(session.posargs[0])
    if out.exists():
        session.error(f"{out} exists; name a folder that does not, or remove it first")
    return out


def _demo_chain(out: str) -> list[str]:
    """The commands of the demo, as one would type them into a shell."""
    convert_data = f"--image_dir {out}/data/images --dataset_dir {out}/data"
    hf_config = f"--cfg.hf_config.hf_dir {out}/hf"
    layers = "--cfg.parallel_config.llm_pp_layers {llm} --cfg.parallel_config.vit_pp_layers {vit}"
    return [
        "ascend-envcheck check",
        f"mm-finetune mini {out}",
        f"mm-datafmt convert {out}/data/train.llava.json {out}/data/train.json {convert_data}",
        f"mm-datafmt convert {out}/data/heldout.llava.json {out}/data/heldout.json {convert_data}",
        f"mm-finetune eval --hf_dir {out}/hf --data {out}/data/heldout.json --output {out}/before.json",
        f"mm-convert Qwen2_5_VLConverter hf_to_mm --cfg.mm_dir {out}/mm {hf_config} "
        f"{layers.format(llm='[[2,2]]', vit='[[4,0]]')} --cfg.parallel_config.tp_size 1",
        f"torchrun --nproc_per_node=2 -m mm_finetune train {out}/train.yaml",
        f"mm-convert Qwen2_5_VLConverter mm_to_hf --cfg.save_hf_dir {out}/hf-tuned --cfg.mm_dir {out}/run/checkpoint "
        f"{hf_config} {layers.format(llm='[2,2]', vit='[4,0]')} --cfg.parallel_config.tp_size 1",
        f"mm-finetune eval --hf_dir {out}/hf-tuned --data {out}/data/heldout.json --output {out}/after.json",
        f'wan-infer --prompt "the digit 7 moves up" --save_file {out}/digit.mp4 --base_seed 7 --contact_sheet',
        f"mm-finetune report {out}/run --before {out}/before.json --after {out}/after.json "
        f"--attach {out}/digit.mp4 {out}/digit.mp4.png --output {out}/report.html",
    ]


def _demo_step(session: nox.Session, environment: Environment, number: int, command: str) -> None:
    """Run one command of the chain and say how long it took."""
    session.log(f"step {number}: {command}")
    name, *arguments = shlex.split(command)
    # Whether this machine has an NPU in order is told, and decides nothing here: the demo runs anywhere.
    codes = [0, 1] if name == "ascend-envcheck" else [0]
    started = time.monotonic()
    session.run(str(environment.command(name)), *arguments, external=True, log=False, success_codes=codes)
    session.log(f"step {number} took {time.monotonic() - started:.1f} s")


def _digit_accuracy(result: Path) -> float:
    return float(json.loads(result.read_text(encoding="utf-8"))["groups"][HELD_OUT_GROUP]["accuracy"])
