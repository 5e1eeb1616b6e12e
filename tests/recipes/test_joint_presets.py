"""The recipes of joint encoders: each passes its proofs, takes twenty steps that lower its losses, and is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import polymodal as pm
from polymodal.data.scenes import make_scenes
from polymodal.recipes.check import check_recipe
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import train

JOINT = ("albef-scenes", "beit3-scenes", "blip-scenes", "flava-scenes", "vilt-scenes")
joint = pytest.mark.parametrize("name", JOINT)
FAST = ["stages.pretrain.batch.samples=8", "stages.pretrain.steps=20", "stages.pretrain.schedule.warmup=0.1"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, 24, 6, 6)
    return folder


@pytest.mark.parametrize("name", [JOINT[0], *(pytest.param(name, marks=pytest.mark.slow) for name in JOINT[1:])])
def test_twenty_steps_lower_the_losses(name: str, scenes: Path, tmp_path: Path) -> None:
    recipe = load_recipe(name, [f"data_root={scenes}", *FAST])
    train(recipe, tmp_path / "run", quiet=True)
    lines = (tmp_path / "run/stages/00-pretrain/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    falling = [key for key in recipe.stages[0].objectives if key.startswith(("masked", "caption", "ml", "mmm_text"))]
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
    report = check_recipe(load_recipe(name, [f"data_root={scenes}", "stages.pretrain.batch.samples=8"]))
    report.raise_failed()
