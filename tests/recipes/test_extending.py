"""A new modality beside a finished run: what was there answers as before, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_recipes
import toys

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.core.parts import Image, Sensor
from polymodal.recipes.check import check_recipe
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import train
from polymodal.recipes.stored_models import load


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipes.write_data(tmp_path_factory.mktemp("data"), num=12)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that sees, and cannot feel."""
    recipe = small_recipes.decoder_recipe(data, small_recipes.stage(data=["captions.jsonl"], steps=3))
    del recipe["model"]["streams"]["sensor"]
    folder = tmp_path_factory.mktemp("base") / "run"
    train(load_recipe(recipe), folder, quiet=True)
    return folder


def extended(base: Path, data: Path, **changes: Any) -> dict[str, Any]:
    stage = small_recipes.stage(
        "feel", train=["streams.sensor"], data=["questions.jsonl"], steps=4, optimizer={"use": "adamw", "lr": 0.01}
    )
    streams = {"sensor": toys.stream("sensor")}
    whole = {"name": "more", "extend": str(base), "data_root": str(data), "model": {"streams": streams}}
    return {**whole, "stages": [stage], **changes}


def test_old_modalities_answer_bit_for_bit_as_before(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(extended(base, data))
    assert list(recipe.model.streams) == ["image", "text", "sensor"]
    report = check_recipe(recipe)
    assert report.is_ok, report.failed
    train(recipe, tmp_path / "run", quiet=True)
    old, new = load(base), load(tmp_path / "run")
    assert old.tokenizer.hub_files() == new.tokenizer.hub_files()
    for index in range(4):
        asked = [Image(data / f"{index}.png"), "What is it?"]
        assert np.array_equal(old.logits(asked), new.logits(asked))
        assert old.chat(*asked, max_new_tokens=8).tokens == new.chat(*asked, max_new_tokens=8).tokens
    assert np.array_equal(old.logits(["Is it red?"]), new.logits(["Is it red?"]))
    parts = [Image(data / "1.png"), "red"]
    assert np.array_equal(old.embed(parts), new.embed(parts))
    state = new.network.state_dict()
    assert all(np.array_equal(tensor, state[name]) for name, tensor in old.network.state_dict().items())
    fresh = load_recipe(extended(base, data))
    felt = [Sensor(data / "0.npy", rate_hz=50), "Is it red?"]
    assert new.logits(felt).shape[0] > new.logits(["Is it red?"]).shape[0]
    assert fresh == load_recipe(tmp_path / "run" / "recipe.yaml")


def test_the_new_run_does_not_need_the_old_one(base: Path, data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "old"
    moved.mkdir()
    for name in ("recipe.yaml", "tokenizer.json", "model.safetensors"):
        (moved / name).write_bytes((base / name).read_bytes())
    train(load_recipe(extended(moved, data)), tmp_path / "run", quiet=True)
    before = load(tmp_path / "run").logits(["Is it red?"])
    for path in moved.iterdir():
        path.unlink()
    assert np.array_equal(load(tmp_path / "run").logits(["Is it red?"]), before)


@pytest.mark.parametrize("other", ["perceiver", {"use": "pool", "factor": 2}], ids=str)
def test_another_variant_of_a_part_that_is_there_is_refused(other: Any, base: Path, data: Path) -> None:
    recipe = extended(base, data)
    recipe["model"]["streams"]["image"] = {"connector": other}
    with pytest.raises(
        ConfigError, match=r"extend: model.streams.image.connector: found '.*', the folder has '.*' there"
    ):
        load_recipe(recipe)


def test_messages(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"extend: .*nothing is no finished run: recipe.yaml, .* missing"):
        load_recipe(extended(tmp_path / "nothing", data))
    stage = small_recipes.stage(steps=1, data=["captions.jsonl"])
    wider = extended(base, data, model={"heads": {"space": {"dim": 5}}}, stages=[stage])
    with pytest.raises(CheckpointError, match=r"tensors do not fit the extended model, such as heads.space.* only add"):
        train(load_recipe(wider), tmp_path / "wider", quiet=True)
    prompt = {"part": "backbone", "adapter": {"use": "prompt", "tokens": 2}}
    recipe = small_recipes.decoder_recipe(data, small_recipes.stage(train=[prompt], steps=1))
    train(load_recipe(recipe), tmp_path / "kept", quiet=True)
    with pytest.raises(ConfigError, match="left the adapter 'default' beside the weights; expected a run whose"):
        load_recipe(extended(tmp_path / "kept", data))
