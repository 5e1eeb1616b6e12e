"""BLIP-2's two stages in one recipe: proofs, losses that fall, a stopped run that goes on, and the model in use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import polymodal as pm
from polymodal.data.scenes import make_scenes
from polymodal.recipes.check import check_recipe
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import train

SMALL = [
    "model.streams.image.connector.depth=2",
    "model.streams.image.connector.queries=4",
    *(f"stages.{name}.batch.{what}" for name, what in (("text", "tokens=256"), ("generate", "tokens=256"))),
    *(f"stages.{name}.batch.samples=8" for name in ("vision", "represent")),
]
STEPS = {"text": 2, "vision": 2, "represent": 12, "generate": 2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, 24, 6, 6)
    return folder


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    steps = [f"stages.{name}.steps={count}" for name, count in STEPS.items()]
    out = tmp_path_factory.mktemp("run") / "run"
    train(load_recipe("blip2-scenes", [f"data_root={scenes}", *SMALL, *steps]), out, quiet=True)
    return out


def weights(run: Path, stage: str) -> dict[str, np.ndarray]:
    return load_file(next((run / "stages").glob(f"*-{stage}/weights.safetensors")))


def test_the_three_losses_of_the_first_stage_fall_together(trained: Path) -> None:
    lines = (trained / "stages/02-represent/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {"infonce", "matching", "caption"} <= set(records[0])
    first, last = (np.mean([record["caption"] for record in part]) for part in (records[:4], records[-4:]))
    assert np.isfinite(last) and last < first


def test_the_second_stage_moves_nothing_but_the_map_to_the_language_model(trained: Path) -> None:
    before, after = weights(trained, "represent"), weights(trained, "generate")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("streams.image.connector.out.")}


def test_the_trained_model_is_used(trained: Path, scenes: Path) -> None:
    model = pm.load(trained)
    picture = pm.Image(next((scenes / "train/media/image").glob("*.png")))
    assert model.embed([picture]).shape == (1, 4, 64) and model.embed(["a red circle"]).shape == (1, 64)
    sample = pm.Sample("a", views={"image": picture, "text": pm.Text("a red circle")})
    assert 0 < model.match([sample])[0] < 1
    assert isinstance(model.chat(picture, "What is this?", max_new_tokens=4).text, str)


@pytest.mark.slow
def test_the_recipe_passes_its_proofs(scenes: Path) -> None:
    check_recipe(load_recipe("blip2-scenes", [f"data_root={scenes}", *SMALL])).raise_failed()
