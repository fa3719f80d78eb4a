"""What is not computed: schedules, their search, and the caches of MindIE SD, in whole generations of wan-mini."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from commanding import QUICK, VIDEO, fails, left
from torch import Tensor, nn

from dit_cache import CacheConfig, CacheWarning, Schedule, Static, TeaCache, VelocityCache
from wan_infer import WanPipeline, wan_mini
from wan_infer.caching import SIDES, made_of, problem
from wan_infer.cli import main
from wan_infer.errors import RequestError

STEPS, DEPTH = 8, 6
# Rounding of a velocity, about 1e-6, grows on the way to the end; a wrong weight is off by 0.1 and more.
AMPLIFIED = 1e-3
ASKED: dict[str, Any] = {"prompt": "the digit 3 moves left", "seed": 1, "steps": STEPS, "frames": 5}


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(wan_mini(), device="cpu")


@pytest.fixture(scope="module")
def reference(pipe: WanPipeline) -> Tensor:
    return pipe(**ASKED).latents


@pytest.fixture(autouse=True)
def own_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wan-infer" / "schedules"


@contextmanager
def counted(*modules: nn.Module) -> Iterator[list[int]]:
    """How often the forward of something inside of each module ran."""
    counts = [0] * len(modules)

    def hook(index: int) -> Any:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    handles = [module.register_forward_hook(hook(n)) for n, module in enumerate(modules)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def inner(pipe: WanPipeline, name: str) -> list[nn.Module]:
    return [pipe.transformer.get_submodule(f"blocks.{n}.{name}") for n in range(DEPTH)]


def schedule(pipe: WanPipeline, plan: str) -> Schedule:
    settings: dict[str, Any] = {"steps": len(plan), "frames": 5}
    sigmas = tuple(problem(pipe, **settings)["sigmas"][:-1])
    return Schedule(plan=plan, sigmas=sigmas, made=made_of(pipe.transformer, pipe.settings(**settings)))


def test_everything_computed_is_bit_exact(pipe: WanPipeline, reference: Tensor) -> None:
    made = pipe(**ASKED, cache=schedule(pipe, "C" * STEPS))
    assert torch.equal(made.latents, reference)
    assert made.computed == 1.0


def test_a_hole_costs_no_evaluation(pipe: WanPipeline, reference: Tensor) -> None:
    with counted(pipe.transformer) as count:
        made = pipe(**ASKED, cache=schedule(pipe, "CC1CC1C1"))
    assert count == [2 * 5]
    assert made.computed == 5 / STEPS
    assert not torch.equal(made.latents, reference)
    assert torch.equal(pipe(**ASKED).latents, reference), "nothing is left behind"


def test_a_hole_is_what_the_formula_says(pipe: WanPipeline) -> None:
    """The line through the last two velocities, done by hand in the same loop."""
    seen: list[tuple[float, Tensor]] = []

    class ByHand(VelocityCache):
        def velocity(self, predict: Any, latents: Tensor, **moment: Any) -> Tensor:
            step = len(self.ledger.entries)
            value = super().velocity(predict, latents, **moment)
            sigma = sigmas[step]
            if step in (2, 5, 7):
                (a, first), (b, second) = seen[-2:]
                value = second + (second - first) * ((sigma - b) / (b - a))
            else:
                seen.append((sigma, value))
            return value

    sigmas = problem(pipe, steps=STEPS, frames=5)["sigmas"]
    by_hand = pipe(**ASKED, cache=ByHand(Static([0, 1, 3, 4, 6]))).latents
    torch.testing.assert_close(pipe(**ASKED, cache=schedule(pipe, "CC1CC1C1")).latents, by_hand, rtol=0, atol=AMPLIFIED)


def test_a_schedule_of_another_model_is_refused_before_anything_is_computed(pipe: WanPipeline) -> None:
    foreign = schedule(pipe, "CC1CC1C1")
    foreign = replace(foreign, made=replace(foreign.made, model="sha256:other"))
    with counted(pipe.transformer) as count, pytest.raises(RequestError, match="other"):
        pipe(**ASKED, cache=foreign)
    assert count == [0]


def test_a_schedule_for_other_steps_is_derived_with_a_warning(pipe: WanPipeline) -> None:
    with pytest.warns(CacheWarning, match="derived"):
        made = pipe(**{**ASKED, "steps": 4}, cache=schedule(pipe, "CC1CC1C1"))
    assert made.computed in (0.5, 0.75)


def test_auto_searches_once_and_keeps_what_it_found(pipe: WanPipeline, own_schedules: Path, reference: Tensor) -> None:
    heard: list[float] = []
    with counted(pipe.transformer) as count:
        made = pipe(**ASKED, cache="auto:0.5", on_search=lambda progress: heard.append(progress.done))
        searching = count[0]
        again = pipe(**{**ASKED, "seed": 2}, cache="auto:0.5")
    assert heard[0] == 0.0
    assert (made.computed, again.computed) == (0.5, 0.5)
    assert count[0] - searching == 2 * 4
    (file,) = own_schedules.iterdir()
    found = Schedule.load(file)
    assert (len(found.plan), len(found.computed)) == (STEPS, 4)
    even = pipe(**ASKED, cache=schedule(pipe, "C1C1C1C1")).latents
    assert (made.latents - reference).norm() < (even - reference).norm()


def test_auto_needs_samples(pipe: WanPipeline) -> None:
    images = tiny_pipeline.ours("i2v")
    with pytest.raises(RequestError, match="text to video"):
        problem(images)
    for wrong in ("auto:", "auto:2", "auto:0", "auto:half"):
        with pytest.raises(RequestError, match=r"auto:0\.4"):
            pipe(**ASKED, cache=wrong)


def by_rule(step: int, config: CacheConfig) -> bool:
    """Whether something is used again at a step: the rule of MindIE SD."""
    inside = config.step_start < step <= config.step_end
    return inside and (step - config.step_start) % config.step_interval != 0


@pytest.mark.parametrize("end", [5, 10000])
def test_attention_is_computed_as_the_rule_says(pipe: WanPipeline, reference: Tensor, end: int) -> None:
    config = CacheConfig("attention_cache", DEPTH, STEPS, step_start=1, step_interval=2, step_end=end)
    reused = sum(by_rule(step, config) for step in range(STEPS))
    assert reused > 0
    with counted(*inner(pipe, "self_attn.q"), *inner(pipe, "ffn")) as count:
        made = pipe(**ASKED, cache=config)
    assert count == [2 * (STEPS - reused)] * DEPTH + [2 * STEPS] * DEPTH
    assert not torch.equal(made.latents, reference)
    assert torch.equal(pipe(**ASKED).latents, reference)


def test_a_range_of_blocks_is_computed_as_the_rule_says(pipe: WanPipeline, reference: Tensor) -> None:
    config = CacheConfig(
        "dit_block_cache", DEPTH, STEPS, step_start=2, step_interval=2, step_end=7, block_start=1, block_end=4
    )
    reused = sum(by_rule(step, config) for step in range(STEPS))
    with counted(*inner(pipe, "ffn")) as count:
        made = pipe(**ASKED, cache=config)
    assert count == [2 * (STEPS - (reused if 1 <= n < 4 else 0)) for n in range(DEPTH)]
    assert not torch.equal(made.latents, reference)
    assert torch.equal(pipe(**ASKED).latents, reference)


def test_a_config_that_leaves_nothing_out_computes_everything(pipe: WanPipeline, reference: Tensor) -> None:
    for config in (
        CacheConfig("dit_block_cache", DEPTH, STEPS, step_interval=2, block_start=1, block_end=1),
        CacheConfig("attention_cache", DEPTH, STEPS, step_start=STEPS, step_interval=2),
    ):
        assert torch.equal(pipe(**ASKED, cache=config).latents, reference)


def test_a_policy_that_looks_at_the_timestep_is_refused(pipe: WanPipeline) -> None:
    with pytest.raises(RequestError, match="TeaCache looks at the timestep"):
        pipe(**ASKED, cache=VelocityCache(TeaCache(0.1)))


def test_a_schedule_for_other_frames_is_said_to_be(pipe: WanPipeline) -> None:
    with pytest.warns(CacheWarning, match="frames"):
        pipe(**{**ASKED, "frames": 9}, cache=schedule(pipe, "CC1CC1C1"))


def test_a_config_for_another_depth_is_refused(pipe: WanPipeline) -> None:
    with pytest.raises(RequestError, match="30 blocks and 8 steps; this model has 6, this run 8"):
        pipe(**ASKED, cache=CacheConfig("attention_cache", 30, STEPS, step_start=1, step_interval=2))


def test_a_failure_in_the_middle_leaves_nothing_behind(pipe: WanPipeline, reference: Tensor) -> None:
    config = CacheConfig("dit_block_cache", DEPTH, STEPS, step_interval=2, block_end=DEPTH)
    clean = pipe(**ASKED, cache=config).latents

    def stop(step: Any) -> None:
        if step.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**ASKED, cache=config, on_step=stop)
    assert torch.equal(pipe(**ASKED).latents, reference)
    assert torch.equal(pipe(**ASKED, cache=config).latents, clean)


def test_sides_are_kept_apart(pipe: WanPipeline) -> None:
    assert SIDES == ("cond", "uncond")
    config = CacheConfig("dit_block_cache", DEPTH, STEPS, step_interval=STEPS, block_end=DEPTH)
    both = pipe(**ASKED, cache=config).latents
    swapped = pipe(**{**ASKED, "prompt": ASKED["prompt"]}, guidance=1.0, cache=config).latents
    assert both.shape == swapped.shape
    assert not torch.equal(both, swapped)


@pytest.mark.usefixtures("folder")
class TestCommand:
    def test_the_flags_of_the_port(self, folder: Path) -> None:
        flags = ["--use_attentioncache", "--start_step", "0", "--attentioncache_interval", "2"]
        assert main([*VIDEO, *flags]) == 0
        record = json.loads((folder / "out.mp4.json").read_text())
        assert record["cache"] == {"start_step": 0, "attentioncache_interval": 2, "end_step": 37}

    def test_numbers_that_leave_nothing_out_are_told(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*VIDEO, "--use_attentioncache"]) == 0
        assert "leaves out nothing of 2" in capsys.readouterr().err

    def test_auto(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*VIDEO, "--cache", "auto:0.5"]) == 0
        assert "once: this takes the time of up to" in capsys.readouterr().err
        record = json.loads((folder / "out.mp4.json").read_text())
        assert (record["cache"], record["computed"]) == ("auto:0.5", 0.5)

    @pytest.mark.filterwarnings("default::dit_cache.CacheWarning")
    def test_what_is_not_verified_is_said_in_a_line(
        self, pipe: WanPipeline, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        schedule(pipe, "CC1CC1C1").save("eight.json")
        assert main([*VIDEO, "--cache", "eight.json"]) == 0
        assert "note: the schedule is for 8 steps" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--start_step", "3"], "no effect without --use_attentioncache"),
            (["--use_attentioncache", "--cache", "auto:0.4"], "give one of them"),
            (["--use_attentioncache", "--attentioncache_interval", "0"], "step_interval"),
            (["--use_attentioncache", "--start_step", "-1"], "step_start"),
            (["--use_attentioncache", "--start_step", "40"], "step_end"),
            (["--cache", "none.json"], "none.json"),
            (["--cache", "auto:much"], "auto:0.4"),
        ],
    )
    def test_bad_flags(self, folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
        assert words in fails(capsys, *QUICK, *flags)
        assert left(folder) == []
