"""The recipes of joint encoders: each passes its proofs, takes twenty steps that lower its losses, and is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import polymodal as pm
from polymodal.data.scenes import make_scenes
from polymodal.recipes.check import check_recipe
from polymodal.recipes.evaluation import own_tasks
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import train

JOINT = ("albef-scenes", "beit3-scenes", "blip-scenes", "flava-scenes", "vilt-scenes")
WORDS = {"masked_text", "mlm", "mmm_text", "caption"}
"""What objectives that predict words are called in these recipes."""
joint = pytest.mark.parametrize("name", JOINT)


def small(name: str, scenes: Path, steps: int = 20) -> list[str]:
    """Overrides that make every stage of a preset a matter of a second."""
    found = [f"data_root={scenes}"]
    for stage in load_recipe(name).stages:
        changes = {"batch.samples": 8, "steps": steps, "schedule.warmup": 0.1}
        found += [f"stages.{stage.name}.{key}={value}" for key, value in changes.items()]
    return found


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, 24, 6, 6)
    return folder


@pytest.mark.parametrize("name", [JOINT[0], *(pytest.param(name, marks=pytest.mark.slow) for name in JOINT[1:])])
def test_twenty_steps_lower_the_losses(name: str, scenes: Path, tmp_path: Path) -> None:
    recipe = load_recipe(name, small(name, scenes))
    train(recipe, tmp_path / "run", quiet=True)
    first_stage, number = next(
        (stage, number) for number, stage in enumerate(recipe.stages) if set(stage.objectives) & WORDS
    )
    path = tmp_path / f"run/stages/{number:02d}-{first_stage.name}/metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    falling = sorted(set(first_stage.objectives) & WORDS)
    for key in falling:
        first, last = (np.mean([record[key] for record in part]) for part in (records[:4], records[-4:]))
        assert np.isfinite(last) and last < first, f"{key}: {first:.3f} -> {last:.3f}"
    model = pm.load(tmp_path / "run")
    picture = next((scenes / "train/media/image").glob("*.png"))
    sample = pm.Sample("a", views={"image": pm.Image(picture), "text": pm.Text("a red circle")})
    if "match" in recipe.model.heads:
        assert 0 < model.match([sample])[0] < 1
    if "space" in recipe.model.heads:
        assert model.embed([pm.Image(picture), "a red circle"]).shape == (2, 64)


@pytest.mark.slow
@joint
def test_a_preset_passes_its_proofs(name: str, scenes: Path) -> None:
    report = check_recipe(load_recipe(name, small(name, scenes)))
    report.raise_failed()


@pytest.mark.parametrize("name", [JOINT[0], *(pytest.param(name, marks=pytest.mark.slow) for name in JOINT[1:])])
def test_a_run_is_measured_on_the_tasks_of_its_recipe(name: str, scenes: Path, tmp_path: Path) -> None:
    train(load_recipe(name, small(name, scenes, steps=1)), tmp_path / "run", quiet=True)
    model = pm.load(tmp_path / "run")
    for task in own_tasks(tmp_path / "run"):
        report = pm.evaluate(model, task)
        assert not report.errors and report.overall.score.n > 0, task.title
        assert {"blind", "shuffled", "majority"} <= set(report.overall.controls) or report.use == "retrieval"
