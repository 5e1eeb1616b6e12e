"""The recipe as a value: what it fills in, what it refuses, and how it is found and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_recipes

from polymodal.core.errors import ConfigError
from polymodal.objectives.classify import Classify
from polymodal.recipes.loading import dump_recipe, load_recipe, preset_names, preset_text
from polymodal.recipes.schema import Recipe

ROOT = Path("data")


def test_a_classify_objective_takes_its_classes_from_the_head() -> None:
    recipe = load_recipe(small_recipes.merge_recipe(ROOT))
    (entry,) = recipe.stages[0].parsed_objectives()
    assert isinstance(entry.config, Classify) and entry.config.classes == ("red", "green", "blue")
    assert entry.weight == 1.0


@pytest.mark.parametrize("objective", [{"mine": {"use": "classify", "weight": 0.5}}, {"classify": {"weight": 0.5}}])
def test_options_beside_the_classes_stay(objective: dict[str, Any]) -> None:
    data = small_recipes.merge_recipe(ROOT)
    data["stages"][0]["objectives"] = objective
    (entry,) = load_recipe(data).stages[0].parsed_objectives()
    assert entry.weight == 0.5 and entry.config.to_data()["classes"] == ["red", "green", "blue"]


def test_classes_that_are_not_the_heads_are_refused() -> None:
    data = small_recipes.merge_recipe(ROOT)
    data["stages"][0]["objectives"] = {"classify": {"classes": ["blue", "green", "red"]}}
    with pytest.raises(
        ConfigError, match=r"stages.classify.objectives.classify: found the classes \['blue', 'green', 'red'\]"
    ):
        load_recipe(data)


@pytest.mark.parametrize("make", [small_recipes.decoder_recipe, small_recipes.merge_recipe])
def test_a_resolved_recipe_reads_back_equal(make: Any, tmp_path: Path) -> None:
    recipe = load_recipe(make(ROOT))
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert load_recipe(recipe) is recipe and load_recipe(recipe, ["seed=3"]).seed == 3


def test_every_preset_reads_back_equal_and_is_shown_as_written(tmp_path: Path) -> None:
    for name in preset_names():
        (tmp_path / f"{name}.yaml").write_text(preset_text(name), encoding="utf-8")
        recipe = load_recipe(name)
        assert load_recipe(tmp_path / f"{name}.yaml") == recipe and recipe.name == name
        (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(tmp_path / "dumped.yaml") == recipe


def test_recipes_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"quikstart: is no file, and unknown preset 'quikstart'; did you mean 'quickstart'"
    ):
        load_recipe("quikstart")
    with pytest.raises(ConfigError) as far:
        load_recipe("clip-vit-bas-patch32")
    assert "did you mean 'clip-vit-base-patch32'" in str(far.value) and len(str(far.value)) < 600
    with pytest.raises(ConfigError, match=r"\.\./presets/quickstart: there is no such file; expected a recipe in YAML"):
        load_recipe("../presets/quickstart")
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ConfigError, match=r"mine.yml: there is no such file; did you mean '.*mine.yaml'"):
        load_recipe(tmp_path / "mine.yml")
    with pytest.raises(ConfigError, match=r"is a folder, expected a YAML file"):
        load_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown preset 'nothing'"):
        preset_text("nothing")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes.yaml: cannot be read as a recipe"):
        load_recipe(tmp_path / "bytes.yaml")


def refused(message: str, stage: dict[str, Any] | None = None, **changes: Any) -> None:
    stages = [small_recipes.stage()] if stage is None else [small_recipes.stage(**stage)]
    with pytest.raises(ConfigError, match=message):
        load_recipe(small_recipes.decoder_recipe(ROOT, *stages, **changes))


def test_what_a_stage_must_agree_on() -> None:
    refused(r"expected at least one entry in 'train' and in 'data'", {"train": []})
    refused(r"grad_cache is for contrastive objectives alone", {"grad_cache": True})
    refused(r"'eval_every' and 'validation' belong together", {"eval_every": 2})
    refused(r"stages.0.name", {"name": "../elsewhere"})
    refused(r"objectives.classify: needs the pass 'merge', which this model cannot run", {
        "objectives": {"classify": {"classes": ["a", "b"]}}
    })  # fmt: skip
    refused(r"max_bad_rate", max_bad_rate=1.0)


def test_stages_have_names_of_their_own_and_are_found_by_them() -> None:
    twice = [small_recipes.stage(), small_recipes.stage()]
    with pytest.raises(ConfigError, match=r"stages: found the names \['tune', 'tune'\], expected each once"):
        load_recipe(small_recipes.decoder_recipe(ROOT, *twice))
    recipe = load_recipe(
        small_recipes.decoder_recipe(ROOT, small_recipes.stage(), small_recipes.stage("more", steps=9))
    )
    assert recipe.stage("more").steps == 9
    with pytest.raises(ConfigError, match=r"unknown stage 'mor'; did you mean 'more'"):
        recipe.stage("mor")


def test_configs_and_plain_data_make_the_same_recipe() -> None:
    recipe = load_recipe(small_recipes.merge_recipe(ROOT))
    fields = {name: getattr(recipe, name) for name in Recipe.model_fields}
    assert Recipe(**fields) == recipe
