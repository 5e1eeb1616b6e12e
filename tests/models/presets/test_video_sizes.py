"""Published sizes of the video, point, sensor and latent architectures: built without memory, counted, compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polymodal.models.compose import MultimodalModel
from polymodal.models.presets import ARCHITECTURES
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

transformers = pytest.importorskip("transformers")

REFERENCED = ("videomae", "timesformer", "patchtst", "perceiver", "xclip")
CASES = [(name, size) for name in REFERENCED for size in ARCHITECTURES[name].sizes]


def reference_count(config: dict[str, Any]) -> int:
    """Parameters of the reference library's class for a published config."""
    plain = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    settings = transformers.AutoConfig.for_model(config["model_type"], **plain)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(settings)
    # Fixed codes are buffers of ours and frozen parameters of theirs.
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("name", "size"), CASES, ids=lambda value: value)
def test_the_count_is_the_published_one(name: str, size: str) -> None:
    architecture = ARCHITECTURES[name]
    published = architecture.sizes[size]
    model = architecture.model(HubConfigs(published.config, published.preprocessor))
    with no_weights():
        network = MultimodalModel(model, model.tokenizer.rows or 16)
    assert num_parameters(network) == reference_count(dict(published.config)) == published.parameters
