"""The report: complete without anything else, harmless whatever the data says, and true."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist

import pytest
from PIL import Image

from mm_finetune.cli import main
from mm_finetune.curve import curve, is_logarithmic, running_mean, short
from mm_finetune.errors import ConfigError, DataError, OutputExistsError
from mm_finetune.evaluation.answers import Answer, Evaluation
from mm_finetune.page import interval
from mm_finetune.report import collect, eval_path, read_metrics, write_report
from mm_finetune.watching import Guard

HOSTILE = "<script>alert('x')</script><img src=http://example.com/a.png onerror=alert(1)>\"'&"


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.visible = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.visible += data


def answers(right: Callable[[int], bool], *, hostile: bool = False) -> list[Answer]:
    """60 answers to two questions, and one without a picture."""
    found = []
    for number in range(60):
        question = "Which digit?" if number % 3 else "Which animal?"
        answer, correct = str(number), right(number)
        if hostile and number < 30:
            question = answer = HOSTILE
        found.append(
            Answer(
                image=f"{number % 5}.png",
                question=question,
                answer=answer,
                prediction=answer if correct else f"no {HOSTILE if hostile else ''}",
                correct=correct,
            )
        )
    text_only = Answer(image=None, question="Without a picture?", answer="y", prediction="y", correct=True)
    return [*found, text_only]


class World:
    """A run of 20 steps and two evaluations in a folder."""

    def __init__(self, folder: Path, *, hostile: bool = False) -> None:
        self.run, self.before, self.after = folder / "run", folder / "before.json", folder / "after.json"
        self.output = folder / "report.html"
        self.run.mkdir()
        for number in range(5):
            Image.new("RGB", (30, 20), (number * 50, 0, 0)).save(folder / f"{number}.png")
        rows = (
            {"step": n, "loss": 5 / n, "lr": 1e-3 / n, "grad_norm": 1.0, "tokens": 100, "elapsed_s": n * 0.5}
            for n in range(1, 21)
        )
        (self.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        name = json.dumps(HOSTILE if hostile else "hf")
        (self.run / "config.yaml").write_text(
            f"model: {{hf_dir: {name}}}\ntrain: {{steps: 20, seed: null}}\nlora: null\n"
        )
        for path, right in ((self.before, lambda n: n % 10 == 0), (self.after, lambda n: n % 4 != 0)):
            model = HOSTILE if hostile else path.stem
            evaluation = Evaluation(model=model, dataset_dir=folder, answers=answers(right, hostile=hostile))
            evaluation.save(path, overwrite=False)

    def write(self, *attach: Path, overwrite: bool = False) -> Page:
        write_report(
            self.run, before=self.before, after=self.after, output=self.output, attach=attach, overwrite=overwrite
        )
        return Page(self.output.read_text())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("hostile", [False, True])
def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path, hostile: bool) -> None:
    page = World(tmp_path, hostile=hostile).write()
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), value
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"url\((?!#)|@import", text)
    assert {"http-equiv": "Content-Security-Policy"}.items() <= next(a for t, a in page.tags if len(a) == 2).items()
    if hostile:
        assert HOSTILE in page.visible, "shown as it is"


def test_numbers_are_those_of_the_evaluations(world: World) -> None:
    visible = re.sub(r"\s+", " ", world.write().visible)
    # 6 of 60 and the one without a picture; 45 of 60 and that one.
    assert f"{7 / 61:.1%}" in visible
    assert f"{46 / 61:.1%}" in visible
    assert "of 61 records" in visible
    animal = [n for n in range(60) if n % 3 == 0]
    assert f"{sum(n % 4 != 0 for n in animal) / len(animal):.1%}" in visible
    assert "15 of 61 records; 15 of them are shown." in visible
    assert "2,000" in visible, "tokens of all steps"
    assert "0:10 min" in visible
    assert "200" in visible, "tokens a second"
    assert visible.index("Which digit?") < visible.index("Which animal?"), "the larger group first"


def test_wrong_answers_come_first_and_are_marked_in_words(world: World) -> None:
    report = collect(world.run, before=world.before, after=world.after)
    assert len(report.wrong) == 15
    assert not any(case.last.correct for case in report.wrong)
    assert len(report.wrong) + len(report.sample) == 40
    shown = {case.last.answer for case in report.wrong} | {case.last.answer for case in report.sample}
    assert len(shown) == 40, "no record twice"
    page = world.write()
    verdicts = re.findall(r"[✓✗] (right|wrong)", page.visible)
    assert verdicts == ["wrong"] * 15 + ["right"] * 25
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 39, "one record has no picture"
    for source in pictures:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert picture.size == (30, 20)


def test_the_same_inputs_give_the_same_bytes(world: World) -> None:
    world.write()
    first = world.output.read_bytes()
    world.write(overwrite=True)
    assert world.output.read_bytes() == first


def test_a_run_that_went_wrong_is_shown_as_well(world: World) -> None:
    lines = (world.run / "metrics.jsonl").read_text().splitlines()[:3]
    lines += ['{"step": 4, "loss": NaN, "lr": 0.0, "tokens": 5, "elapsed_s": 0}']
    (world.run / "metrics.jsonl").write_text("\n".join(lines))
    assert "last lossno number" in world.write().visible


@pytest.mark.parametrize(("right", "count"), [(0, 1), (0, 300), (258, 300), (300, 300), (3, 7)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    # Its ends are the shares p from which the seen one lies 1.96 standard deviations sqrt(p (1 - p) / n) away.
    z, seen = NormalDist().inv_cdf(0.975), right / count
    for end in interval(seen, count):
        assert abs(seen - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count), abs=1e-6)
    low, high = interval(seen, count)
    assert 0 <= low <= seen <= high <= 1
    assert low < high


def test_the_running_mean() -> None:
    assert running_mean([1.0, 2.0, 6.0, 4.0], share=0.5) == [1.0, 1.5, 4.0, 5.0]
    assert running_mean([3.0, 1.0]) == [3.0, 1.0]


def test_an_existing_page_is_kept(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--before", str(world.before), "--after", str(world.after), "--output", str(world.output)]
    assert main(["report", str(world.run), *options]) == 0
    assert "11.5% -> 75.4%" in capsys.readouterr().out
    assert main(["report", str(world.run), *options]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    with pytest.raises(OutputExistsError):
        world.write()


def test_faults_of_the_run_are_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = world.run / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n')
    with pytest.raises(DataError, match=r"line 1 is not a step of a run.*loss"):
        world.write()
    metrics.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 is not a step"):
        read_metrics(metrics)
    metrics.write_text("")
    with pytest.raises(DataError, match="holds no step"):
        world.write()
    metrics.unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist; a run holds"):
        world.write()
    assert not world.output.exists()
    assert main(["report", str(metrics)]) == 2
    assert "metrics.jsonl is no folder; give that of a run" in capsys.readouterr().err


def test_faults_of_the_settings_are_named(world: World) -> None:
    config = world.run / "config.yaml"
    for text, words in (("a: [", "is not valid YAML"), ("- 1", "must hold sections"), ("a: 1", "must hold sections")):
        config.write_text(text)
        with pytest.raises(DataError, match=words):
            world.write()


def test_faults_of_the_evaluations_are_named(world: World) -> None:
    text = world.after.read_text()
    value = json.loads(text)
    value["samples"].pop()
    world.after.write_text(json.dumps(value))
    with pytest.raises(DataError, match="different records; evaluate both on the same --data"):
        world.write()
    value = json.loads(text)
    value["samples"][0]["image"] = "1.png"
    world.after.write_text(json.dumps(value))
    with pytest.raises(DataError, match="different records"):
        world.write()
    value["samples"][0]["image"] = 5
    for broken in (json.dumps(value), "[]", "{", '{"samples": []}', '{"samples": [{}]}', "[" * 100_000):
        world.after.write_text(broken)
        with pytest.raises(DataError, match="is not a file that mm-finetune eval wrote"):
            world.write()
    world.after.unlink()
    with pytest.raises(DataError, match=r"after\.json does not exist"):
        world.write()


def test_attached_pictures_and_videos_are_inside_the_page(world: World, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "sheet.png")
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom-and-so-on")
    page = world.write(tmp_path / "sheet.png", tmp_path / "clip.mp4")
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag in ("img", "video")][:2]
    assert [source.partition(";")[0] for source in sources] == ["data:image/png", "data:video/mp4"]
    for source, name in zip(sources, ("sheet.png", "clip.mp4"), strict=True):
        assert base64.b64decode(source.partition(",")[2]) == (tmp_path / name).read_bytes()
    assert "sheet.png" in page.visible
    assert "media-src data:" in world.output.read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gif", b"GIF89a", r"only .png pictures and .mp4 videos"),
        ("a.png", None, "no such file"),
        ("a.png", b"<svg onload=alert(1)>", "no PNG file"),
        ("a.mp4", b"\x89PNG\r\n\x1a\n", "no MP4 file"),
        ("a.mp4", b"\0" * 20_000_001, "more than 20 MB"),
    ],
)
def test_what_cannot_be_attached_is_named(
    world: World, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        world.write(tmp_path / name)
    assert not world.output.exists()


def test_pictures_that_are_gone_or_damaged(world: World) -> None:
    """A page of a finished run can be made after its data set moved."""
    (world.run.parent / "3.png").unlink()
    page = world.write()
    missing = page.visible.count("picture missing")
    assert missing >= 1
    assert missing + sum(tag == "img" for tag, _ in page.tags) == 39, "of 40 cards one never had a picture"
    (world.run.parent / "2.png").write_text("this is no picture")
    with pytest.raises(DataError, match=r"2\.png"):
        world.write(overwrite=True)


def test_a_missing_library_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib is not installed: pip install 'mm-finetune\[report\]'"):
        world.write()


def test_a_question_cannot_steer_the_terminal(tmp_path: Path) -> None:
    answer = Answer(image=None, question="\x1b[31mred\nline", answer="a", prediction="a", correct=True)
    text = Evaluation(model="m", dataset_dir=tmp_path, answers=[answer]).describe()
    assert "\x1b" not in text
    assert len(text.splitlines()) == 2


def add_stages(world: World, steps: tuple[int, ...]) -> None:
    """Evaluations in the middle of the run; after step n the first n records of each ten are right."""
    for step in steps:
        path = eval_path(world.run, step)
        path.parent.mkdir(exist_ok=True)
        found = answers(lambda n, step=step: n % 10 < step)  # type: ignore[misc]
        found = [replace(one, prediction=f"{one.prediction} at {step}") for one in found]
        Evaluation(model="m", dataset_dir=world.run.parent, answers=found).save(path, overwrite=False)


def test_a_run_without_evaluations_has_a_page(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(world.run)]) == 0
    assert capsys.readouterr().out == f"page: {world.run / 'report.html'}\n"
    page = Page((world.run / "report.html").read_text())
    assert "Exactly right answers" not in page.visible
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels == ["Loss by step", "Learning rate by step", "Gradient norm by step"]


def test_what_else_the_run_noted_is_drawn(world: World) -> None:
    rows = [json.loads(line) for line in (world.run / "metrics.jsonl").read_text().splitlines()]
    noted = [row | {"tokens_per_second": 200.0, "mfu": 0.25, "data_wait": 0.01 * row["step"]} for row in rows]
    noted[3] |= {"mfu": None, "loss": None}
    (world.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in noted))
    page = world.write()
    assert "Tokens a second by step" in [attributes.get("aria-label") for _, attributes in page.tags]
    assert "median MFU25.0%" in page.visible
    assert "median data wait10.5%" in page.visible, "between 10 and 11 % of 20 steps"


def test_predictions_over_time(world: World) -> None:
    add_stages(world, (2, 4, 6, 8))
    report = collect(world.run, before=world.before, after=world.after)
    assert [stage.label for stage in report.stages] == ["before", "step 2", "step 4", "step 6", "step 8", "after"]
    write_report(world.run, output=world.output)
    page = Page(world.output.read_text())
    visible = re.sub(r"\s+", " ", page.visible)
    # 2 and 8 of each ten of 60, and the one without a picture.
    assert f"{13 / 61:.1%}→{49 / 61:.1%}step 2 → step 8, of 61 records" in visible
    assert "Share of right answers by step" in [attributes.get("aria-label") for _, attributes in page.tags]
    cards = re.findall(r'<dl class="said">(.*?)</dl>', world.output.read_text())
    assert len(cards) == 40
    for card in cards:
        assert re.findall(r"<dt>(.*?)</dt>", card) == ["answer", "step 2", "step 4", "step 6", "step 8"]
        assert re.findall(r" at (\d)</dd>", card) == ["2", "4", "6", "8"]


def test_evaluations_in_the_middle_must_be_of_the_same_records(world: World) -> None:
    add_stages(world, (2, 4))
    path = eval_path(world.run, 4)
    value = json.loads(path.read_text())
    value["samples"].pop()
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"step_0000002.json and .*step_0000004.json are answers to different records"):
        collect(world.run)


def test_evaluations_in_the_middle_may_be_of_fewer_records(world: World) -> None:
    """Then they are a curve of their own, and the cards compare before and after."""
    add_stages(world, (2, 4))
    for step in (2, 4):
        path = eval_path(world.run, step)
        value = json.loads(path.read_text())
        path.write_text(json.dumps(value | {"samples": value["samples"][::4], "loss": 3 / step}))
    page = world.write()
    assert re.search(rf"{7 / 61:.1%}\s*→\s*{46 / 61:.1%}", page.visible)
    labels = [attributes.get("aria-label") for _, attributes in page.tags]
    assert {"Share of right answers by step", "Loss of the right answers by step"} <= set(labels)
    cards = re.findall(r'<dl class="said">(.*?)</dl>', world.output.read_text())
    assert all(re.findall(r"<dt>(.*?)</dt>", card) == ["answer", "before", "after"] for card in cards)


def test_a_graded_metric_is_named_and_counted_in_parts(tmp_path: Path) -> None:
    world = World(tmp_path)
    for path, half in ((world.before, 0.0), (world.after, 0.75)):
        found = [
            Answer(image=None, question=f"{n}?", answer="a", prediction="b", correct=n > 0, score=half if n else 0.0,
                   groups=("all alike", f"group {n % 2}"))
            for n in range(10)
        ]  # fmt: skip
        Evaluation(model="m", dataset_dir=tmp_path, answers=found, metric="anls", loss=1.5).save(path, overwrite=True)
    assert Evaluation.load(world.after).loss == 1.5
    page = world.write()
    assert "ANLS" in page.visible
    assert re.search(r"0\.0%\s*→\s*67\.5%", page.visible), "nine of ten have 0.75"
    assert re.search(r"all alike · 10", page.visible)
    assert "1 of 10 records" in page.visible, "the wrong ones are those that count nothing"
    value = json.loads(world.after.read_text())
    world.after.write_text(json.dumps(value | {"metric": "exact"}))
    with pytest.raises(DataError, match="with the same --metric"):
        collect(world.run, before=world.before, after=world.after)


def test_refused_steps_are_listed(world: World) -> None:
    guard = Guard(world.run / "anomalies.jsonl", policy="skip")
    for step in range(1, 4):
        guard.decide(math.nan, 1.5)
        guard.settle(step, range(100, 140))
    with (world.run / "anomalies.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "kind": HOSTILE, "loss": 2.0, "grad_norm": 1e9, "samples": [HOSTILE]}) + "\n")
    page = world.write()
    assert "4 steps left the weights as they were; 4 of them are shown." in page.visible
    assert "loss is no number" in page.visible
    assert "100, 101, 102" in page.visible
    assert "40 in all" in page.visible
    assert page.visible.count(HOSTILE) == 2
    assert not {tag for tag, _ in page.tags} & {"script"}
    assert not [tag for tag, attributes in page.tags if tag == "img" and "onerror" in attributes]


def test_settings_that_were_chosen_stand_apart(world: World) -> None:
    """Batch size has no default, 8 is not LoRA's alpha, and 1e-5 is the learning rate of the recipe as it is."""
    (world.run / "config.yaml").write_text(
        "model: {hf_dir: ../Qwen2.5-VL-7B}\ntrain: {steps: 50, global_batch_size: 32, lr: 1.0e-5, freeze: []}\n"
        "lora: {r: 16, alpha: 8.0}\nparallel: {tp_size: 1}\nelsewhere: {key: true}\n"
    )
    report = collect(world.run)
    assert report.chosen == {
        "model": {"hf_dir": "../Qwen2.5-VL-7B"},
        "train": {"steps": 50, "global_batch_size": 32},
        "lora": {"r": 16, "alpha": 8.0},
        "elsewhere": {"key": True},
    }
    page = world.write()
    assert "Fine-tuning report: run" in page.visible
    assert "Qwen2.5-VL-7B · LoRA of rank 16" in page.visible
    assert "steps20 of 50" in page.visible, "the run did not come to its end"
    chosen, _, everything = page.visible.partition("All settings")
    assert "tp_size" in everything
    assert "tp_size" not in chosen
    assert "details" in {tag for tag, _ in page.tags}


def test_pairs_have_curves_of_their_own(world: World) -> None:
    rows = [json.loads(line) for line in (world.run / "metrics.jsonl").read_text().splitlines()]
    noted = [row | {"reward_margin": row["step"] - 3.0, "reward_accuracy": 0.5, "logp_chosen": -9.0} for row in rows]
    (world.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in noted))
    (world.run / "config.yaml").write_text("preference: {loss: ipo}\ntrain: {freeze: ['visual.*']}\n")
    page = world.write()
    labels = [attributes.get("aria-label") for _, attributes in page.tags]
    assert {"Reward margin by step", "Reward accuracy by step"} <= set(labels)
    assert "without visual.*, ipo on pairs" in page.visible


def test_long_answers_fold_and_graded_ones_say_how_right(tmp_path: Path) -> None:
    world, long = World(tmp_path), "word " * 100 + "<b>end</b>"
    found = [Answer(image=None, question=long, answer="a", prediction=long, correct=True, score=0.75)]
    Evaluation(model="m", dataset_dir=tmp_path, answers=found).save(world.after, overwrite=True)
    write_report(world.run, after=world.after, output=world.output)
    page = Page(world.output.read_text())
    assert [tag for tag, _ in page.tags].count("details") == 3, "question, prediction, settings"
    assert "✓ right (0.75)" in page.visible
    assert "b" not in {tag for tag, attributes in page.tags if not attributes}


def test_curves_take_their_colours_from_the_page_and_any_values() -> None:
    for values in ([math.nan], [1.0], [math.nan, 2.0, math.nan], [-1.0, 0.0, 5.0], [1e-9, 1e9], [0.0, 0.0]):
        svg = curve(range(1, 1 + len(values)), values, label="<x>", smooth=True, log=True, percent=len(values) == 1)
        assert "var(--accent)" in svg
        assert not re.search(r"(stroke|fill): #", svg)
        assert 'aria-label="&lt;x&gt; by step"' in svg
    assert not is_logarithmic([-1.0, 100.0])
    assert not is_logarithmic([5.0, 6.0])
    assert is_logarithmic([0.1, math.nan, 5.0])
    assert [short(value) for value in (0.02, 1e-5, 0, 500, 12_000, 1.5e6, 1e30)] == [
        "0.02", "1e-05", "0", "500", "12k", "1.5M", "1e+30"
    ]  # fmt: skip
