"""A merge model through the public interface: training without text, classifying with views absent."""

import numpy as np
import pytest

import polymodal as pm
from polymodal.core.errors import ConfigError, SampleError
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.model import Model

RECIPE = {
    "name": "tiny",
    "model": {
        "streams": {
            "points": {
                "modality": "points",
                "encoder": {"use": "pointnet", "width": 8, "hidden": [8], "num_points": 8},
                "enters": {"use": "merge", "missing": "learned"},
            },
            "sensor": {
                "modality": "sensor",
                "encoder": {"use": "tcn", "width": 8, "depth": 1, "num_channels": 2},
                "enters": {"use": "merge"},
            },
        },
        "backbone": {"use": "merge", "width": 8, "fusion": "gated"},
        "heads": {"kind": {"use": "class", "classes": ["a", "b", "c"]}},
    },
}


@pytest.fixture
def model():
    return Model(assemble(load_recipe(RECIPE)))


def samples(count):
    rng = np.random.default_rng(0)
    return [
        pm.Sample(
            f"s{i}",
            views={
                "points": pm.Points(rng.random((8, 6)).astype(np.float32)),
                "sensor": pm.Sensor(rng.normal(size=(6, 2)).astype(np.float32), rate_hz=10),
            },
        )
        for i in range(count)
    ]


def test_a_model_that_reads_no_text_needs_no_text_for_its_tokenizer(model):
    assert model.tokenizer.size < 300


def test_classify_gives_labels_and_probabilities(model):
    labels, chances_SC = model.classify(samples(5))
    assert chances_SC.shape == (5, 3)
    assert chances_SC.dtype == np.float32
    assert np.allclose(chances_SC.sum(1), 1, atol=1e-6)
    assert labels == [("a", "b", "c")[row] for row in chances_SC.argmax(1)]


def test_batches_and_absent_views_of_others_change_nothing(model):
    whole = samples(5)
    mixed = [whole[0], whole[1].without("points"), whole[2].without("sensor"), *whole[3:]]
    _, together = model.classify(mixed)
    _, in_twos = model.classify(mixed, batch_size=2)
    alone = np.concatenate([model.classify([sample])[1] for sample in mixed])
    assert np.allclose(together, in_twos, atol=1e-6)
    assert np.allclose(together, alone, atol=1e-6)
    assert not np.allclose(together[1], model.classify([whole[1]])[1][0], atol=1e-6)


def test_nothing_to_classify_is_an_empty_answer(model):
    labels, chances_SC = model.classify([])
    assert labels == []
    assert chances_SC.shape == (0, 3)


def test_a_sample_of_other_modalities_is_named(model):
    with pytest.raises(SampleError, match=r"has views \['text'\], this model takes \['points', 'sensor'\]"):
        model.classify([pm.Sample("s", views={"text": pm.Text("a")})])


def test_a_model_without_a_class_head_says_what_it_has():
    data = {**RECIPE, "model": {**RECIPE["model"], "heads": {"space": {"use": "projection", "dim": 4}}}}
    model = Model(assemble(load_recipe(data)))
    with pytest.raises(ConfigError, match=r"no head of the kind 'class'; its heads: \['space'\]"):
        model.classify(samples(1))
