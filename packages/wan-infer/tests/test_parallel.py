"""One video on several processes is that of one process: in every layout, for every kind of model, with every cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import parallel_cases as cases
import pytest
import torch
from commanding import BYTE, QUICK, VIDEO, left
from ranks import run_all, run_ranks

from dit_cache import Schedule
from wan_infer import WanPipeline, wan_mini
from wan_infer.caching import made_of, problem
from wan_infer.cli import main
from wan_infer.parallel import Alone
from wan_infer.video import read_frames

# What rounding in float32 comes to over the steps, of latents of about 6; a wrong shard is off by 0.1 and more. Few,
# large steps of wan-mini make more of a rounding, up to 4e-5 for 4 of them, so it takes those of the walk-through here.
EXACT = 1e-5

LAYOUTS: dict[int, tuple[cases.Layout, ...]] = {
    2: ((1, 2, 1), (2, 1, 1)),
    4: ((1, 4, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)),
    8: ((1, 8, 1), (2, 2, 2)),
}
MODELS: dict[int, tuple[str, ...]] = {
    2: ("t2v", "i2v", "flf2v", "vace"),
    4: ("five", "i2v", "vace"),
    8: ("five", "one token"),  # where heads and tokens run out
}
CACHES: dict[cases.Layout, tuple[str | None, ...]] = {
    (1, 2, 1): (None, "range", "schedule"),
    (2, 1, 1): (None, "range", "schedule"),
    (1, 8, 1): ("attention",),
    (2, 2, 2): ("attention, shorter",),
}


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a schedule for `cases.MINI`."""
    pipe = WanPipeline.from_pretrained(wan_mini(), device="cpu")
    settings = {"steps": 8, "frames": cases.MINI["frames"]}
    sigmas = tuple(problem(pipe, **settings)["sigmas"][:-1])
    made = made_of(pipe.transformer, pipe.settings(**settings))
    file = tmp_path_factory.mktemp("schedules") / "plan.json"
    Schedule(plan="CC1CC1C1", sigmas=sigmas, made=made).save(file)
    return str(file)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_latents_are_those_of_one_process(ranks: int, schedule: str) -> None:
    wanted: list[tuple[str, str | None, cases.Layout]] = []
    for layout in LAYOUTS[ranks]:
        caches = [schedule if cache == "schedule" else cache for cache in CACHES.get(layout, ())]
        wanted += [(model, None, layout) for model in MODELS[ranks]] + [("mini", cache, layout) for cache in caches]
    kinds = list(dict.fromkeys((kind, cache) for kind, cache, _ in wanted))
    alone = dict(zip(kinds, cases.latents([(*kind, cases.ALONE) for kind in kinds]), strict=True))
    every = run_all(ranks, cases.latents, wanted)
    for index, (kind, cache, layout) in enumerate(wanted):
        off = (every[0][index] - alone[kind, cache]).abs().max().item()
        assert off <= EXACT, (kind, cache, layout)
        assert all(torch.equal(of_rank[index], every[0][index]) for of_rank in every), "all have the same"


def test_a_token_at_the_wrong_place_matters() -> None:
    """That the comparison above would see a shard at the wrong place."""
    (right,) = cases.latents([("five", None, cases.ALONE)])

    class Misplaced(Alone):
        def shards(self, tokens: int) -> cases.Turned:
            return cases.Turned()

    assert (cases.tiny_latents("five", Misplaced()) - right).abs().max() > 0.1


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = run_all(2, cases.refusals, (2, 1, 1))
    assert first == second, "all ranks say the same"
    guidance, search, absent, image, plan = first
    assert "share out the tokens alone: cfg=1 (--cfg_size 1)" in guidance
    assert "search it once in one process" in search
    assert "absent.json" in absent
    assert "has no use for image" in image
    assert "3" in plan
    assert "2" in plan


@pytest.mark.usefixtures("folder")
class TestCommand:
    def run(self, ranks: int, folder: Path, *runs: Sequence[str]) -> list[tuple[int, str, str]]:
        """What the first rank says; the others have to say nothing, and to end with the same code."""
        first: list[tuple[int, str, str]]
        first, *others = run_all(ranks, cases.commands, folder, runs)
        for other in others:
            assert other == [(code, "", "") for code, *_ in first]
        return first

    def test_only_the_first_process_writes(self, folder: Path) -> None:
        seeded = [*QUICK[:4], "--device", "cpu", "--frame_num", "5", "--json"]
        done, again, file = self.run(
            *(4, folder),
            [*seeded, "--cfg_size", "2", "--ulysses_size", "2", "--save_file", "out.mp4"],
            [*VIDEO, "--ulysses_size", "4"],
            [*seeded, "--prompt_file", "absent.txt"],
        )
        assert done[0] == 0
        (record,) = json.loads(done[1])
        assert record["parallel"] == {"cfg": 2, "ulysses": 2, "ring": 1}
        assert left(folder) == ["out.mp4", "out.mp4.json"]
        assert json.loads(Path("out.mp4.json").read_text())["seed"] == record["seed"]
        assert (again[0], again[1]) == (2, "")
        assert again[2].count("out.mp4 exists already") == 1
        assert (file[0], file[1]) == (2, "")

    def test_the_plan_is_chosen_and_said(self, folder: Path) -> None:
        (done,) = self.run(2, folder, [*VIDEO, "--vae_tiling", "--contact_sheet"])
        assert done[0] == 0
        assert "2 processes: " in done[2]
        assert left(folder) == ["out.mp4", "out.mp4.json", "out.mp4.png"]

    def test_sizes_that_do_not_fit(self, folder: Path) -> None:
        said = self.run(
            *(2, folder),
            [*VIDEO, "--ulysses_size", "3"],
            [*VIDEO, "--ulysses_size", "0"],
            [*VIDEO, "--cfg_size", "2", "--sample_guide_scale", "1"],
            [*VIDEO, "--ulysses_size", "2", "--cache", "auto:0.5"],
            [*VIDEO, "--ulysses_size", "two"],
        )
        for (code, out, err), words in zip(said, ("3", "0", "one side", "search it once", "invalid int"), strict=True):
            assert (code, out) == (2, "")
            assert words in err
        assert left(folder) == []

    def test_a_schedule_that_one_process_has_found(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cases.schedules(folder)))
        asked = [*VIDEO[:-2], "--sample_steps", "4", "--cache", "auto:0.5", "--save_file"]
        assert main([*asked, "one.mp4"]) == 0
        ((code, _, said),) = self.run(2, folder, [*asked, "two.mp4", "--ulysses_size", "2"])
        assert code == 0, said
        assert "search" not in said
        records = [json.loads(Path(f"{name}.mp4.json").read_text()) for name in ("one", "two")]
        assert [(record["cache"], record["computed"]) for record in records] == [("auto:0.5", 0.5)] * 2
        torch.testing.assert_close(read_frames("two.mp4"), read_frames("one.mp4"), rtol=0, atol=BYTE)

    def test_a_process_that_is_lost_ends_the_others(self, folder: Path) -> None:
        losses = [(0, "--cfg_size"), (1, "--ulysses_size")]
        folders = [folder / f"without-{lost}" for lost, _ in losses]
        with ThreadPoolExecutor(len(losses)) as pool:
            started = [
                pool.submit(run_ranks, 2, cases.loses, at, lost, [*VIDEO, "--sample_steps", "4", size, "2"])
                for at, (lost, size) in zip(folders, losses, strict=True)
            ]
        for at, (lost, _), results in zip(folders, losses, started, strict=True):
            code, out, err = results.result()[1 - lost]
            assert (code, out) == (2, "")
            assert f"wan-infer: error: rank {lost} was lost while rank {1 - lost} exchanged" in err
            assert "Traceback" not in err
            assert left(at) == []

    def test_several_without_torchrun(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*VIDEO, "--cfg_size", "2", "--ulysses_size", "2"]) == 2
        assert "torchrun --nproc_per_node=4 -m wan_infer" in capsys.readouterr().err
        assert left(folder) == []
