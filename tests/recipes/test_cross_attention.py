"""A recipe whose decoder looks at a stream: proved, trained from scratch, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import toys
from small_recipes import decoder_recipe, stage, write_data

import polymodal as pm


@pytest.mark.parametrize("enters", [{}, {"gate": "tanh", "mask": "latest_media"}], ids=str)
def test_a_recipe_with_a_stream_that_is_looked_at_is_proved_and_trains(tmp_path: Path, enters: dict[str, str]) -> None:
    root = write_data(tmp_path / "data")
    recipe = decoder_recipe(root, stage(train=["streams.*", "backbone"]))
    recipe["model"]["streams"]["image"] = toys.stream("image", enters={"use": "cross_attention", **enters})
    del recipe["model"]["streams"]["text"], recipe["model"]["heads"]["space"]
    report = pm.check(recipe)
    assert [(proof.name, proof.figure) for proof in report.proofs if proof.status == "failed"] == []
    pm.train(recipe, tmp_path / "run", quiet=True)
    photo = pm.Image(root / "0.png")
    answer = pm.load(tmp_path / "run").chat(photo, "What is it?", max_new_tokens=4)
    assert answer.tokens == pm.load(tmp_path / "run").chat(photo, "What is it?", max_new_tokens=4).tokens
