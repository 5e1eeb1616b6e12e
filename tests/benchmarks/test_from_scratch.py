"""The page of recipes trained from scratch: margins, merging, and that it is made of the stored results."""

import json

import pytest
from benchmarks import from_scratch

from polymodal.evaluation.scores import Report, Row, Score
from polymodal.recipes.loading import load_recipe


def score(value, n=100, half=0.05):
    return Score(value, value - half, value + half, n)


def report(task="matching: val", value=0.9, **controls):
    controls = controls or {"blind": 0.5, "shuffled": 0.6}
    rows = [
        Row(family, score(at), {name: score(other) for name, other in controls.items()}, metrics={"AUC": 0.95})
        for family, at in (("colour", value), ("shape", 0.62))
    ]
    overall = Row("all", score((value + 0.62) / 2), rows[0].controls)
    return Report(task, "matching", "how", overall, tuple(rows)).to_data()


def record(name="vilt-scenes", **changes):
    return {
        "recipe": name, "date": "2026-11-22", "command": f"python -m benchmarks.from_scratch {name}",
        "hardware": {"cpu": "c", "cores": 2}, "threads": 1, "corpus": {"version": 3, "scenes": {"train": 6000}},
        "parameters": 12345, "stages": {"names": 500}, "seconds": {"wall": 600.0, "cpu": 300.0}, "tasks": [report()],
        **changes,
    }  # fmt: skip


def test_a_margin_is_over_the_best_control_and_clear_where_the_interval_is_above_it():
    page = from_scratch.markdown({"vilt-scenes": record()})
    assert "| colour | 100 | 0.900 | 0.850 to 0.950 | 0.500 | 0.600 | +30.0 | 0.950 |" in page
    assert "| shape | 100 | 0.620 | 0.570 to 0.670 | 0.500 | 0.600 | (+2.0) | 0.950 |" in page
    assert "| overall | 100 | 0.760 | 0.710 to 0.810 | 0.500 | 0.600 | +16.0 |  |" in page
    assert "| [`vilt-scenes`](#vilt-scenes) | 5.0 | 12,345 | 2 of 3 | +30 | matching: val: shape |" in page


def test_a_recipe_measured_again_replaces_its_line_alone(tmp_path):
    path = tmp_path / "results" / "store.json"
    from_scratch.merge(record("vilt-scenes", date="2026-11-21"), path)
    from_scratch.merge(record("albef-scenes"), path)
    held = from_scratch.merge(record("vilt-scenes", date="2026-11-23"), path)
    assert json.loads(path.read_text()) == held
    assert [(name, line["date"]) for name, line in held.items()] == [
        ("albef-scenes", "2026-11-22"),
        ("vilt-scenes", "2026-11-23"),
    ]


def test_the_page_is_made_of_the_stored_results(capsys):
    assert from_scratch.main(["--check"]) == 0, capsys.readouterr().err


def test_every_listed_recipe_names_tasks():
    for name in from_scratch.RECIPES:
        assert load_recipe(name).evaluate, name


@pytest.mark.slow
def test_a_recipe_is_trained_measured_and_put_into_the_file(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        """
name: tiny
model:
  tokenizer: {use: bpe, vocab_size: 300}
  streams:
    text: {modality: text, encoder: {use: embedding, width: 16, max_tokens: 160}, connector: identity, enters: sequence}
    image:
      modality: image
      encoder: {use: patches, patch_size: 16, grid: 4, width: 16}
      connector: identity
      enters: sequence
  backbone: {use: encoder, transformer: {width: 16, depth: 1, heads: 2}}
  heads: {match: {use: matching}, words: {use: masked_token}}
stages:
  - name: names
    train: [streams, backbone, heads]
    data: [{path: train/names.jsonl, modalities: [image], as_views: true}]
    objectives: {matching: {negatives: batch}, masked_text: {mask: {text: 0.4}}}
    batch: {samples: 4}
    steps: 2
evaluate:
  - {use: matching, name: matching, data: val/names.jsonl}
  - {use: masked_words, name: words, data: val/names.jsonl}
"""
    )
    scenes = from_scratch.SCENES
    from_scratch.SCENES = (8, 4, 2)
    try:
        places = {"--out": "runs", "--data": "data", "--store": "s.json"}
        options = [text for key, place in places.items() for text in (key, str(tmp_path / place))]
        assert from_scratch.main([str(recipe), *options]) == 0
        first = json.loads((tmp_path / "s.json").read_text())["tiny"]
        assert from_scratch.main([str(recipe), *options]) == 0
    finally:
        from_scratch.SCENES = scenes
    again = json.loads((tmp_path / "s.json").read_text())["tiny"]
    assert first["stages"] == {"names": 2} and first["seconds"]["cpu"] > 0
    assert [task["use"] for task in first["tasks"]] == ["matching", "masked_words"]
    assert again["seconds"]["cpu"] == first["seconds"]["cpu"], "a finished training is measured again, not trained"
    assert [task["overall"] for task in again["tasks"]] == [task["overall"] for task in first["tasks"]]
