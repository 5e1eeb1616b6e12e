"""Frames chosen by a question in the shared space."""

from __future__ import annotations

import numpy as np
import pytest
from small_recipes import decoder_recipe, write_data

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.recipes.assemble import assemble
from polymodal.recipes.keyframes import most_like
from polymodal.recipes.loading import load_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pm.Model:
    return pm.Model(assemble(load_recipe(decoder_recipe(write_data(tmp_path_factory.mktemp("data"), 3)))))


def test_the_frames_most_like_the_question_in_their_order(model: pm.Model) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    video = pm.Video(frames, fps=4.0)
    (words,) = model.embed(["a red square"])
    likeness = model.embed([pm.Image(frame) for frame in frames]) @ words
    expected = sorted(sorted(range(12), key=lambda place: -likeness[place])[:3])
    chosen = model.keyframes(video, "a red square", 3)
    assert np.array_equal(chosen.source, frames[expected])
    assert chosen.fps == pytest.approx(1.0), "as long as before: 3 frames in 3 seconds"
    assert chosen.content_key() == model.keyframes(video, "a red square", 3).content_key()
    few = model.keyframes(video, "a red square", 2, candidates=4)
    looked_at = [1, 4, 7, 10]
    best = sorted(sorted(looked_at, key=lambda place: -likeness[place])[:2])
    assert np.array_equal(few.source, frames[best])
    assert len(model.keyframes(video, "?", 50).source) == 12


def test_equal_frames_give_the_first_and_impossible_wishes_are_refused(model: pm.Model) -> None:
    assert most_like(np.asarray([0.1, 0.9, 0.3, 0.9, 0.9], np.float32), 2) == [1, 3]
    with pytest.raises(ConfigError, match="found 5 frames of 4 candidates, expected 1 to 4"):
        model.keyframes(pm.Video(np.zeros((6, 16, 16, 3), np.uint8), fps=1.0), "?", 5, candidates=4)
