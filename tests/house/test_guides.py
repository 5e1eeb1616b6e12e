"""What the guides show works: fragments are read by the package, Python blocks run on small models."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import make_data, make_run

import polymodal as pm
from polymodal.core.parts import Video
from polymodal.evaluation.tasks import TASKS
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, kind: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def readme() -> dict[str, Any]:
    """The recipe of the README, which the guides change."""
    return yaml.safe_load(blocks("README.md", "yaml")[0])


def guide(name: str, kind: str = "yaml") -> list[Any]:
    found = blocks(f"docs/guide/{name}.md", kind)
    return [yaml.safe_load(block) for block in found] if kind == "yaml" else found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and the run of a quickstart with random weights."""
    folder = tmp_path_factory.mktemp("guides")
    data = make_data(folder / "data" / "scenes")
    make_run(folder / "runs" / "quickstart" / "run", data, ("model.backbone.transformer.depth=4",))
    return folder


@pytest.fixture(scope="module")
def place(quick: Path) -> Path:
    """That folder, with the other runs and files that the guides speak of."""
    media = quick / "data" / "scenes" / "val" / "media"
    for name, file in {"photo.png": "image/000000.png", "beep.wav": "audio/000000.wav"}.items():
        shutil.copy(media / file, quick / name)
    shutil.copy(next((media / "video").glob("000000.*")), quick / "walk.mp4")
    sounds = {**readme(), "data_root": str(quick / "data" / "scenes")}
    for stage in sounds["stages"]:
        stage["steps"] = 1
    pm.train(sounds, quick / "runs" / "sounds", quiet=True)
    shutil.copytree(quick / "runs" / "sounds", quick / "runs" / "base")
    return quick


@pytest.mark.parametrize("model", guide("fusion"), ids=lambda model: model["backbone"]["use"])
def test_the_models_of_the_guide_to_fusion_are_built(model: dict[str, Any], quick: Path) -> None:
    tokenizer = {"use": "file", "path": str(quick / "runs" / "quickstart" / "run" / "tokenizer.json")}
    recipe = load_recipe({"name": "shown", "model": {"tokenizer": tokenizer, **model}})
    assert sum(parameter.numel() for parameter in assemble(recipe).network.parameters()) > 1000


def test_the_tasks_of_the_guide_to_evaluation_are_tasks() -> None:
    shown = [task for block in guide("evaluation") for task in (block if isinstance(block, list) else [block])]
    assert {TASKS.parse(task, "task").to_data()["use"] for task in shown} >= {"questions", "matching", "captions"}


@pytest.mark.slow
def test_the_fragments_of_the_guide_to_small_models_fit_the_recipe(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    for fragment in guide("efficient"):
        recipe = readme()
        if "stages" in fragment:
            recipe = fragment
        elif "model" in fragment:
            recipe["model"] |= fragment["model"]
        else:
            recipe["stages"][1] |= fragment
        assert load_recipe(recipe).stages


def test_the_fragments_of_the_guide_to_budgets_fit_the_recipe() -> None:
    whole, encoder, drop = guide("token-budget")
    recipe = readme()
    recipe["tokens"] = whole["tokens"]
    recipe["model"]["streams"]["image"] |= {**whole["model"]["streams"]["image"], **encoder}
    recipe["model"]["backbone"]["transformer"]["depth"] = 4
    loaded = load_recipe({**recipe, **drop})
    assert loaded.tokens == 256 and loaded.drop_media is not None
    assert loaded.model.streams["image"].encoder.num_features(1) == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["token-budget", "efficient"])
def test_python_blocks_run(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if page == "efficient":
        pytest.importorskip("torchao")
        from polymodal.recipes.run_adapters import export_run_adapters

        export_run_adapters(place / "runs" / "base", place / "runs" / "lora")
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    for block in guide(page, "python"):
        exec(compile(block, page, "exec"), names)
    if page == "token-budget":
        said = capsys.readouterr().out
        assert "photo.png (image): every 4 tokens pooled, 4 of 16 tokens" in said
        assert "media tokens dropped after block 2 of 4" in said
        assert isinstance(names["short"], Video) and names["short"].fps
