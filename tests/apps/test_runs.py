"""check, train, evaluate and presets, as a person and as a machine call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_recipes
import yaml
from typer.testing import CliRunner

from polymodal.apps.cli import app
from polymodal.apps.runs import _print_report
from polymodal.core.errors import ConfigError
from polymodal.evaluation.scores import Report, Row, Score
from polymodal.recipes.loading import preset_names, preset_text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and two recipes: one that is sound, one with a fault."""
    folder = tmp_path_factory.mktemp("place")
    root = small_recipes.write_data(folder / "data", num=12)
    sound = small_recipes.decoder_recipe(root, small_recipes.stage(steps=2))
    faulty = small_recipes.decoder_recipe(root, small_recipes.stage(data=["captions.jsonl"]))
    for name, recipe in {"sound": sound, "faulty": faulty}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_check_prints_a_line_per_proof_and_the_verdict(place: Path) -> None:
    result = call("check", place / "sound.yaml")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0, result.stdout
    assert lines[-1].startswith("small: all ") and lines[-1].endswith("proofs hold")
    (placeholders,) = [line for line in lines if "placeholders = features" in line]
    assert placeholders.startswith("ok      stage tune")
    assert all(line.split()[0] in ("ok", "skipped") for line in lines[:-1])


def test_check_ends_with_1_and_names_the_proof_that_does_not_hold(place: Path) -> None:
    result = call("check", place / "faulty.yaml")
    assert result.exit_code == 1
    assert "every trained part gets a gradient" in result.stdout and "streams.sensor.connector" in result.stdout
    assert "1 of" in result.stdout.splitlines()[-1] and "do not hold" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(("name", "code"), [("sound", 0), ("faulty", 1)])
def test_check_for_machines(place: Path, name: str, code: int) -> None:
    result = call("check", place / f"{name}.yaml", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == code and data["ok"] is (code == 0) and data["recipe"] == "small"
    assert {"proof", "where", "status", "figure"} == set(data["proofs"][0])
    assert [proof["proof"] for proof in data["proofs"] if proof["status"] == "failed"] == (
        ["every trained part gets a gradient"] if code else []
    )


def test_train_evaluate_and_train_again(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = call("train", place / "sound.yaml", "stages.tune.steps=3", "--out", out, "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and data["was_finished"] is False
    assert data["stages"]["tune"]["steps"] == 3 and data["stages"]["tune"]["losses"]["next_token"] > 0
    assert Path(data["model"]).is_file()
    again = call("train", place / "sound.yaml", "stages.tune.steps=3", "--out", out)
    assert again.exit_code == 0 and "this run is finished; there is nothing to do" in again.output
    task = place / "data" / "questions.jsonl"
    shown = call("evaluate", out, task, "--limit", 3, "--out", tmp_path / "scores")
    assert shown.exit_code == 0 and "questions" in shown.stdout and "majority" in shown.stdout
    assert (tmp_path / "scores" / "00-questions.jsonl").is_file()
    machine = json.loads(call("evaluate", out, task, "--limit", 3, "--json").stdout)
    assert machine["tasks"][0]["overall"]["score"]["n"] == 3


def test_train_says_what_trains_before_it_starts_and_what_it_took(place: Path, tmp_path: Path) -> None:
    result = call("train", place / "sound.yaml", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "parameters train, " in result.output and "are frozen; predicted" in result.output
    assert "tune: took" in result.output and "ask it: polymodal ask" in result.output


def test_what_a_model_could_not_answer_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("overall", Score(0.0, 0.0, 0.0, 1))
    _print_report(Report("val", "questions", "", row, (row,), ("7: a[1].png: no tensor [/bold] of [U, D]",)))
    assert "could not be answered: 7: a[1].png: no tensor [/bold] of [U, D]" in capsys.readouterr().out


def test_presets_are_listed_and_shown() -> None:
    listed = json.loads(call("presets", "list", "--json").stdout)["presets"]
    assert [preset["name"] for preset in listed] == preset_names()
    assert all(name in call("presets", "list").stdout for name in preset_names())
    assert call("presets", "show", "quickstart").stdout == preset_text("quickstart")


def test_a_run_is_measured_on_the_tasks_of_its_recipe(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    task = yaml.safe_dump([{"use": "questions", "name": "own", "data": "questions.jsonl", "limit": 2}])
    recipe = place / "sound.yaml"
    assert call("train", recipe, "stages.tune.steps=1", f"evaluate={task}", "--out", out, "--json").exit_code == 0
    (report,) = json.loads(call("evaluate", out, "--json").stdout)["tasks"]
    assert (report["task"], report["overall"]["score"]["n"]) == ("own", 2)
    assert call("train", recipe, "stages.tune.steps=1", "--out", tmp_path / "bare", "--json").exit_code == 0
    refused = call("evaluate", tmp_path / "bare")
    assert refused.exit_code != 0
    assert "names no task under 'evaluate'" in str(refused.exception) + refused.output


def test_a_name_that_leads_out_of_runs_needs_a_folder(place: Path) -> None:
    result = call("train", place / "sound.yaml", "name=../out")
    assert isinstance(result.exception, ConfigError)
    assert "name: found '../out', expected the name of a folder below runs; or give --out" in str(result.exception)


def test_a_file_where_the_run_should_be_is_refused(place: Path) -> None:
    result = call("train", place / "sound.yaml", "--out", place / "sound.yaml")
    assert "sound.yaml: is a file, expected a folder; choose another --out" in str(result.exception)
