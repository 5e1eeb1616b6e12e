"""Every recipe that ships: it parses, reloads equal, says what it is, and passes its own proofs on a tiny corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymodal.data.scenes import make_scenes
from polymodal.recipes.check import check_recipe
from polymodal.recipes.loading import PRESETS, dump_recipe, load_recipe, preset_names

SHIPPED = {"clip", "llava", "quickstart", "siglip", "three-encoders"}
presets = pytest.mark.parametrize("name", preset_names())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, 12, 6, 6)
    return folder


def test_the_presets_are_there() -> None:
    assert set(preset_names()) >= SHIPPED


@presets
def test_a_preset_parses_is_called_what_its_file_is_and_reloads_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.stages
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@presets
def test_a_preset_begins_with_what_it_is(name: str) -> None:
    assert (PRESETS / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHIPPED - {"quickstart"}))
def test_a_preset_passes_its_proofs(name: str, scenes: Path) -> None:
    stages = load_recipe(name).stages
    small = [
        f"stages.{s.name}.batch={{tokens: 512}}" if s.batch.packed else f"stages.{s.name}.batch.samples=8"
        for s in stages
    ]
    report = check_recipe(load_recipe(name, [f"data_root={scenes}", *small]))
    report.raise_failed()
    assert any(proof.status == "ok" for proof in report.proofs)


def test_three_encoders_merge_three_times_512_by_cross_modal_attention() -> None:
    model = load_recipe("three-encoders").model
    assert {name: stream.encoder.width for name, stream in model.streams.items()} == dict.fromkeys(
        ("text", "image", "audio"), 512
    )
    assert model.merge_streams == ["text", "image", "audio"]
    assert model.backbone.fusion["use"] == "cross_attention"


def test_the_first_stages_of_minigpt4_are_those_of_blip2() -> None:
    mini, blip2 = load_recipe("minigpt4"), load_recipe("blip2-scenes")
    made = [stage for stage in blip2.stages if stage.name != "generate"]
    assert mini.model == blip2.model and list(mini.stages[: len(made)]) == made
    assert all([entry.part for entry in s.train] == ["streams.image.connector.out"] for s in mini.stages[len(made) :])
