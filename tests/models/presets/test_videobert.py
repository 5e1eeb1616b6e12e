"""VideoBERT: visual words as the paper makes them, what is hidden and predicted, and how many parameters it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, build, medium

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.passes import TokenPass
from polymodal.models.compose import ModelConfig, MultimodalModel
from polymodal.models.encoders import ENCODERS
from polymodal.models.encoders.quantised import Quantised, hierarchical_means
from polymodal.models.presets import find_size
from polymodal.models.presets.architecture import Vocabulary
from polymodal.models.presets.videobert import VIDEOBERT
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

BASE = {
    "use": "frame_temporal", "width": 8, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8, "num_frames": 3,
}  # fmt: skip
SMALL = {
    "model_type": "videobert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "vocab_size": 300, "max_position_embeddings": 20, "max_clips": 4,
    "branches": 3, "levels": 2, "clip_encoder": BASE,
}  # fmt: skip
SAMPLES = [
    pm.Sample("a", views={"video": medium("video", 0), "text": pm.Text("a red cube spins")}),
    pm.Sample("b", views={"text": pm.Text("it falls")}),
    pm.Sample("c", views={"video": medium("video", 1)}),
]


def toy() -> Toy:
    return build(VIDEOBERT.to_model(HubConfigs(SMALL)))


def encoder_of(found: Toy) -> Quantised:
    encoder = found.network.streams["video"].encoder
    assert isinstance(encoder, Quantised)
    return encoder


def test_a_feature_becomes_its_nearest_centre() -> None:
    found = toy()
    encoder, stream = encoder_of(found), found.batch(SAMPLES[:1]).streams["video"]
    with torch.no_grad():
        features = encoder.base(stream.values, stream.lengths).x_UND[0]
        distances = torch.cdist(features, encoder.centres_KC)
        codes = encoder.codes(stream.values, stream.lengths)
        tokens = encoder(stream.values, stream.lengths).x_UND[0]
        expected = encoder.code_embed(codes[0]) + encoder.positions.weight[: len(tokens)]
    assert codes[0].tolist() == distances.argmin(1).tolist()
    torch.testing.assert_close(tokens, expected)


def test_centres_are_those_of_the_clusters() -> None:
    """Nine clouds far apart, three times three: each gets its own centre."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.cartesian_prod(torch.tensor([0.0, 100.0, 200.0]), torch.tensor([0.0, 5.0, 10.0]))
    cloud = (middle[:, None] + 0.1 * torch.randn(9, 30, 2, generator=generator)).flatten(0, 1)
    best = min(
        (hierarchical_means(cloud, 3, 2, seed) for seed in range(5)), key=lambda c: torch.cdist(cloud, c).amin(1).sum()
    )
    assert torch.cdist(middle, best).amin(1).max() < 0.5
    assert torch.equal(hierarchical_means(cloud, 3, 2, 1), hierarchical_means(cloud, 3, 2, 1))


def test_fitting_spreads_the_words_over_the_features() -> None:
    found = toy()
    encoder = encoder_of(found)
    values = torch.randn(20, 3, *encoder.config.unit_shape, generator=torch.Generator().manual_seed(0))
    lengths = torch.full((20,), 3)
    with torch.no_grad():
        encoder.fit(encoder.base(values, lengths).x_UND.flatten(0, 1))
    assert len(set(encoder.codes(values, lengths).flatten().tolist())) >= 6
    with pytest.raises(ConfigError, match="k-means: found 2 features, expected at least 3"):
        encoder.fit(torch.zeros(2, 8))


def test_nothing_trains_the_frozen_encoder() -> None:
    encoder = encoder_of(toy())
    assert not list(encoder.base.parameters()) and "base.frame.patch_embed.weight" in encoder.state_dict()
    assert all(not name.startswith("base") for name, _ in encoder.named_parameters())


def test_hidden_words_of_both_kinds_are_predicted_in_one_run() -> None:
    found = toy()
    mask = (("text", 0.3), ("video", 0.3))
    words, clips = TokenPass("masked", "words", mask), TokenPass("masked", "clips", mask)
    outputs = found.network(found.batch(SAMPLES), (words, clips, "match")).tokens
    assert outputs[clips].predictions.shape[1] == 9 and set(outputs[clips].samples.tolist()) == {0, 2}
    assert outputs[words].predictions.shape[1] == 300 and set(outputs[words].samples.tolist()) == {0, 1}
    sum(outputs[needed].predictions.square().sum() for needed in (words, clips)).backward()
    encoder = encoder_of(found)
    assert encoder.mask_token is not None and encoder.mask_token.grad is not None and encoder.mask_token.grad.any()


def test_configs_read_back_as_they_were_written() -> None:
    model = ModelConfig.parse(VIDEOBERT.to_model(HubConfigs(SMALL)))
    files = VIDEOBERT.to_hub(model, Vocabulary(300))
    assert VIDEOBERT.model(HubConfigs(files["config.json"])) == model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": {"use": "vit"}}, "base: found an encoder of image, expected one of video"),
        ({"base": {"use": "nothing"}}, "unknown encoder 'nothing'"),
    ],
)
def test_what_cannot_be_quantised_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ENCODERS.parse({"use": "quantised", **options})


def test_the_size_of_the_paper() -> None:
    """BERT-large without its pooler, and 20,736 visual words with their own positions."""
    architecture, size = find_size("videobert-large")
    with no_weights():
        network = MultimodalModel(architecture.model(HubConfigs(size.config)), 30522)
    assert num_parameters(network) == size.parameters
    blocks = 24 * (12 * 1024**2 + 13 * 1024)
    assert num_parameters(network.backbone.transformer) == blocks  # type: ignore[union-attr]
    assert network.streams["video"].encoder.code_embed.weight.shape == (12**4, 1024)
