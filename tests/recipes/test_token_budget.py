"""``tokens`` on a stream, in a recipe and in a request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_recipes import decoder_recipe, write_data

import polymodal as pm
from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.samples import conversation
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import load_recipe


def test_one_key_in_three_places(tmp_path: Path) -> None:
    data = decoder_recipe(write_data(tmp_path, 3))
    data["model"]["streams"]["image"]["tokens"] = 3
    data["tokens"] = 6
    model = pm.Model(assemble(load_recipe(data)))
    image, sensor = pm.Image(tmp_path / "0.png"), pm.Sensor(np.zeros((40, 2), np.float32), rate_hz=50.0)

    def media_tokens(*parts: object, **options: int) -> tuple[int, tuple[str, ...]]:
        answer = model.chat(*parts, "What is it?", max_new_tokens=2, **options)  # type: ignore[arg-type]
        return answer.prompt_tokens - model.chat("What is it?", max_new_tokens=2).prompt_tokens, answer.choices

    assert media_tokens(image) == (2, (f"{tmp_path / '0.png'} (image): every 2 tokens pooled, 2 of 4 tokens",))
    count, said = media_tokens(image, image, sensor)
    assert count <= 6 and len(said) == 3
    assert media_tokens(image, sensor, tokens=3)[0] <= 3
    wide, words = media_tokens(image, sensor, tokens=50)
    assert wide == 2 + 10 and len(words) == 1  # the stream's own budget holds in every request
    with pytest.raises(SampleError, match="budget of 1 for 2 media items"):
        model.chat(image, sensor, "?", tokens=1)
    pieces = list(model.stream(image, sensor, "What is it?", tokens=3, max_new_tokens=2))
    assert "".join(pieces) == model.chat(image, sensor, "What is it?", tokens=3, max_new_tokens=2).text


def test_dropping_media_tokens_in_a_recipe_and_in_a_request(tmp_path: Path) -> None:
    data = decoder_recipe(write_data(tmp_path, 3), backbone={"transformer": {"depth": 3}})
    model = pm.Model(assemble(load_recipe(data)))
    image = pm.Image(tmp_path / "0.png")
    half = {"after": 1, "share": 0.5}
    asked = model.chat(image, "What is it?", max_new_tokens=4, drop_media=half)
    assert asked.choices[0].startswith("2 of 4 media tokens dropped after block 1 of 3")
    assert model.chat(image, "What is it?", max_new_tokens=4).choices == ()
    always = pm.Model(assemble(load_recipe({**data, "drop_media": half})))
    always.network.load_state_dict(model.network.state_dict())
    assert always.chat(image, "What is it?", max_new_tokens=4).tokens == asked.tokens
    sample = conversation(image, "What is it?")
    assert always.answer([sample], 4) == model.answer([sample], 4, drop_media=half)
    with pytest.raises(ConfigError, match="after: 3 and the backbone 'decoder' of 3 blocks"):
        load_recipe({**data, "drop_media": {"after": 3, "share": 0.5}})
    with pytest.raises(ConfigError, match="drop_media"):
        model.chat(image, "?", drop_media={"after": 1, "share": 1.5})
