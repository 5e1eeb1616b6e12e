import io
import json
import os
import shlex
from pathlib import Path

import pytest
import yaml
from tiny_runs import scenes_recipe

from polymodal.apps import quickstart as app
from polymodal.apps.output import Bar
from polymodal.core.errors import CheckpointError, ConfigError, DataError
from polymodal.evaluation.scores import Report, Row, Score, rescore
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.quickstart import SIZES, Sizes, run_quickstart
from polymodal.recipes.quickstart_report import Expected, notes, training_rows
from polymodal.recipes.stored_models import load

SMALL = Sizes(num_train=12, num_val=6, num_novel=4, per_family=2, per_control=1, searched=20)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(scenes_recipe()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    """A whole quickstart, and what it said."""
    out = tmp_path_factory.mktemp("quick") / "out"
    said: list[str] = []
    told: list[tuple[str, int, int]] = []
    result = run_quickstart(
        out, preset=str(recipe), sizes=SMALL, say=said.append, advance=lambda *step: told.append(step), quiet=True
    )
    return result, said, told


def test_leaves_report_scores_and_a_run_that_loads(made):
    result, said, told = made
    assert [line[:3] for line in said] == ["1/4", "2/4", "3/4", "4/4"]
    assert ("rendering scenes", 22, 22) in told
    assert any(what == "val: without image" for what, _, _ in told)
    page = result.report.read_text(encoding="utf-8")
    assert "<script" not in page
    for section in ("ask", "scores", "examples", "mistakes", "retrieval", "training", "timings", "environment"):
        assert f'id="{section}"' in page, section
    data = json.loads((result.out / "report.json").read_text(encoding="utf-8"))
    assert [report["task"] for report in data["reports"]][:2] == ["val", "novel"]
    assert data["seconds_in_all"] == pytest.approx(sum(result.seconds.values()), abs=0.01)
    assert data["headline"] == result.headline and "6 modalities" in result.headline
    assert {"python", "torch", "cores"} <= data["environment"].keys()
    assert load(result.run).recipe.name == "tiny"


def test_every_family_of_val_stands_beside_its_controls(made):
    val, novel, *searches = made[0].scores
    assert {row.family for row in val.rows} >= {"attribute", "motion", "sound_colour"}
    for row in val.rows:
        assert {"blind", "majority", "wording"} <= row.controls.keys(), row.family
    withheld = {name for row in val.rows for name in row.controls if name.startswith("without_")}
    assert withheld == {"without_audio", "without_image", "without_video"}
    assert "shuffled" in val.overall.controls and "shuffled" not in novel.overall.controls
    assert "text to image" in [search.task for search in searches]
    assert "image to video, never paired" in [search.task for search in searches]


def test_ask_lines_name_real_files_of_every_modality(made):
    kinds = []
    for line in made[0].ask:
        program, command, run, *files, question = shlex.split(line)
        assert (program, command) == ("polymodal", "ask") and Path(run, "model.safetensors").is_file()
        assert question.endswith(("?", "."))
        assert all(Path(file).is_file() for file in files)
        kinds.append(tuple(Path(file).parent.name for file in files))
    assert set(kinds) >= {("image",), ("audio",), ("video",), ("points",), ("sensor",), ("image", "audio")}


def test_a_second_call_repeats_nothing(made, recipe, monkeypatch):
    result = made[0]
    before = {path: path.stat().st_mtime_ns for path in (result.out / "predictions").iterdir()}
    assert before and all(path.suffix == ".jsonl" for path in before)

    def must_not(*_: object, **__: object) -> None:
        raise AssertionError("a stored result was computed again")

    monkeypatch.setattr("polymodal.recipes.quickstart.evaluate", must_not)
    monkeypatch.setattr("polymodal.recipes.run.StageRun", must_not)
    again = run_quickstart(result.out, preset=str(recipe), sizes=SMALL, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in (result.out / "predictions").iterdir()} == before
    assert [report.to_data() for report in again.scores] == [report.to_data() for report in result.scores]


def test_predictions_older_than_the_weights_are_made_again(made, recipe):
    result = made[0]
    stored = result.out / "predictions" / "novel.jsonl"
    os.utime(stored, (0, 0))
    run_quickstart(result.out, preset=str(recipe), sizes=SMALL, quiet=True)
    assert stored.stat().st_mtime >= (result.run / "model.safetensors").stat().st_mtime
    assert rescore(stored).task == "novel"


def test_another_recipe_or_other_sizes_are_refused(made, recipe):
    out = made[0].out
    with pytest.raises(CheckpointError, match="holds a run of another recipe"):
        run_quickstart(out, ["seed=5"], preset=str(recipe), sizes=SMALL, quiet=True)
    with pytest.raises(DataError, match="scenes made with other settings"):
        run_quickstart(out, preset=str(recipe), sizes=Sizes(5, 5, 5), quiet=True)


def test_a_recipe_that_asks_nothing_is_refused(tmp_path):
    path = tmp_path / "silent.yaml"
    path.write_text(yaml.safe_dump(scenes_recipe(evaluate=[])), encoding="utf-8")
    with pytest.raises(ConfigError, match="'evaluate' holds no questions task"):
        run_quickstart(tmp_path / "out", preset=str(path), sizes=SMALL)
    assert not (tmp_path / "out").exists()


def test_training_rows_split_a_loss_over_its_pairs(made):
    rows = training_rows(made[0].run)
    assert [row["stage"] for row in rows] == ["contrast", "instruct"]
    names = list(rows[0]["losses"])
    assert len(names) >= 2 and all(name.endswith("-text") for name in names)
    assert min(rows[0]["losses"].values()) <= rows[0]["loss"] <= max(rows[0]["losses"].values())


def score_of(value: float) -> Score:
    return Score(value, value, value, 10)


def report_of(task: str, **families: tuple[float, float]) -> Report:
    rows = [Row(name, score_of(full), {"blind": score_of(blind)}) for name, (full, blind) in families.items()]
    overall = Row("overall", score_of(sum(full for full, _ in families.values()) / len(families)))
    return Report(task, "questions", "exact match", overall, tuple(rows))


def test_notes_name_every_shortfall():
    good = report_of("val", count=(0.9, 0.3), which_sound=(0.8, 0.5))
    assert notes("quickstart", [good]) == [
        "val: at least 80% right as expected, and every family at least 25 points above its blind baseline "
        "(the least: 30)."
    ]
    weak = report_of("val", count=(0.9, 0.3), which_sound=(0.4, 0.3))
    assert notes("quickstart", [weak]) == [
        "val: 65.0% right overall, below the 80% expected of quickstart.",
        "Families of val less than 25 points above their blind baseline: which sound (+10).",
    ]
    assert Expected().novel == 0.0
    full = notes("scenes-full", [good, report_of("novel", count=(0.5, 0.3))])
    assert full == [
        "val: 85.0% right overall, below the 95% expected of scenes-full.",
        "novel: 50.0% right overall, below the 80% expected of scenes-full.",
        "Families of val below the 85% expected: which sound (80%).",
    ]


def test_score_table_shows_percent(made):
    title, columns, rows = app.score_table(made[0].scores[0])
    assert title.startswith("val:") and columns[:3] == ["family", "score", "blind"]
    assert columns[-2:] == ["without", "n"]
    assert rows[-1][0] == "overall"
    assert "image " in next(row for row in rows if row[0] == "sound colour")[-2]


def test_run_prints_the_result(made, monkeypatch, capsys):
    result = made[0]
    given = {}
    monkeypatch.setattr(app, "run_quickstart", lambda *args, **options: given.update(options) or result)
    app.run(result.out, [], "quickstart", "12,6,4", as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["report"] == str(result.report) and data["scores"].keys() >= {"val", "novel"}
    assert given["sizes"] == Sizes(12, 6, 4) and given["preset"] == "quickstart" and given["say"] is None
    app.run(result.out, [], "quickstart", None, as_json=False)
    said = capsys.readouterr().out
    assert given["sizes"] is None
    for line in (result.headline, f"Report: {result.report}", *result.ask, "val: percent right", "overall"):
        assert line in said, line


@pytest.mark.parametrize("wrong", ["4000", "1,2", "1,2,x", "0,1,1", "-1,2,3"])
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected three counts above zero: TRAIN,VAL,NOVEL"):
        app.parse_sizes(wrong)


def test_sizes_are_read():
    assert app.parse_sizes("40, 10,5") == Sizes(40, 10, 5)
    assert app.parse_sizes(None) is None
    assert {"quickstart", "scenes-full"} == SIZES.keys()


def test_bar_writes_lines_only_when_it_takes_long():
    now = [0.0]
    stream = io.StringIO()
    with Bar(stream, clock=lambda: now[0]) as bar:
        bar("rendering", 1, 9)
        now[0] = 11.0
        bar("rendering", 5, 9)
        now[0] = 12.0
        bar("rendering", 9, 9)
    assert stream.getvalue() == "rendering 5/9\n"


@pytest.mark.slow
def test_the_shipped_preset_runs_through(tmp_path):
    stages = load_recipe("quickstart").stages
    sizes = Sizes(num_train=40, num_val=6, num_novel=4, per_family=2, per_control=1, searched=20)
    steps = [f"stages.{stage.name}.steps=1" for stage in stages]
    result = run_quickstart(tmp_path / "out", steps, sizes=sizes, quiet=True)
    assert result.report.is_file() and len(result.ask) >= 6
