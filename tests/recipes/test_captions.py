"""Captions by whatever writes them: a model that chats is asked, a joint encoder is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import make_data, make_run

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.samples import Message, Sample
from polymodal.data.sources import open_source
from polymodal.evaluation.tasks import CaptionsTask
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import train

SMALL = [
    "model.streams.image.encoder={use: cnn, image_size: 16, width: 8, blocks: [1]}",
    "model.streams.text.encoder={use: embedding, width: 16, max_tokens: 96}",
    "model.backbone={use: encoder, cls: false, token_types: false, transformer: {width: 16, depth: 1, heads: 2}}",
    "stages.contrast.steps=1", "stages.contrast.batch.samples=4",
    "stages.pretrain.steps=1", "stages.pretrain.batch.samples=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("captions") / "scenes")


def pictures(data: Path) -> list[pm.Media]:
    source = open_source(data / "val/views.jsonl")
    views = [source[i].views for i in range(len(source))]
    return [there["image"] for there in views if "image" in there]


def test_a_model_that_chats_is_asked(data: Path, tmp_path: Path) -> None:
    model = pm.load(make_run(tmp_path / "run", data))
    picture = pictures(data)[0]
    asked = Sample("a", (Message("user", (picture, pm.Text("Tell."))),))
    blind = Sample("b", (Message("user", (pm.Text("Tell."),)),))
    found = model.caption([picture, None], "Tell.", max_new_tokens=6)
    assert found == model.answer([asked, blind], 6)
    unasked = Sample("c", (Message("user", (picture,)),))
    assert model.caption([picture], "", max_new_tokens=6) == model.answer([unasked], 6)
    assert not model.can_match
    with pytest.raises(ConfigError):
        model.match([unasked])


def test_a_joint_encoder_writes_after_it_is_loaded_again(data: Path, tmp_path: Path) -> None:
    train(load_recipe("blip-scenes", [f"data_root={data}", *SMALL]), tmp_path / "run", quiet=True)
    model, again = pm.load(tmp_path / "run"), pm.load(tmp_path / "run")
    shown = [*pictures(data), None]
    found = model.caption(shown, max_new_tokens=6)
    assert len(found) == len(shown) and found == again.caption(shown, "Not read.", max_new_tokens=6)
    assert model.can_match
    recipe = load_recipe("blip-scenes", [f"data_root={data}"])
    task = CaptionsTask.parse(
        {**recipe.evaluate[0], "data": str(data / "val/views.jsonl"), "max_new_tokens": 6}, "task"
    )
    report = pm.evaluate(model, task)
    assert report.use == "captions" and set(report.overall.controls) == {"blind", "shuffled", "majority"}
    assert [row.family for row in report.rows] == ["place", "size", "colour", "shape"]


def test_the_facts_of_blip_scenes_are_those_of_its_captions(data: Path) -> None:
    from polymodal.evaluation.caption_scores import fact_pattern, read_things

    recipe = load_recipe("blip-scenes")
    pattern = fact_pattern(recipe.evaluate[0]["facts"])
    for split in ("train", "val", "novel"):
        for line in (data / split / "views.jsonl").read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            if "image" in sample["views"]:
                facts = sample["label"].split("; ")
                told = [" ".join(thing.values()) for thing in read_things(sample["views"]["text"], pattern)]
                assert all(fact.startswith(thing) for fact, thing in zip(facts, told, strict=True))
