"""PatchTST against the reference library, whose outputs have four axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.encoders import ENCODERS

from .reference import assert_close, assert_missing_is_named, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")


def saved(folder: Path, kind: str = "PatchTSTModel", **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.PatchTSTConfig(
        **{
            "num_input_channels": 3, "context_length": 21, "patch_length": 6, "patch_stride": 4, "d_model": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "num_targets": 5, **changes,
        }
    )  # fmt: skip
    return save_reference(randomise(getattr(transformers, kind)(config)), folder)


def recordings(length: int = 21) -> torch.Tensor:
    return 3.0 + torch.randn(2, length, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_type": "layernorm", "pre_norm": False, "scaling": "mean", "positional_encoding_type": "random"},
        {"scaling": None, "patch_stride": 6},
    ],
    ids=["published", "layer-post-mean-learned", "unscaled"],
)
def test_features_and_export_equal_the_reference(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = saved(tmp_path / "a", **changes)
    reference = transformers.PatchTSTModel.from_pretrained(folder)
    model = pm.load(folder)
    features = model.network.streams["sensor"].encoder(recordings(), torch.tensor([21, 21]))
    states_UCPD = reference(recordings()).last_hidden_state
    assert states_UCPD.ndim == 4
    assert_close(features.x_UND, states_UCPD.transpose(1, 2).flatten(1, 2))
    assert_close(features.pooled_UD, states_UCPD.mean((1, 2)))
    assert model.export(tmp_path / "b") == "patchtst"
    assert_same_weights(transformers.PatchTSTModel.from_pretrained(tmp_path / "b"), reference)


def test_a_recording_and_its_class_equal_the_reference(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "PatchTSTForClassification")
    reference = transformers.PatchTSTForClassification.from_pretrained(folder)
    model = pm.load(folder)
    part = pm.Sensor(np.asarray(recordings()[0]), rate_hz=50)
    pooled = model.features([part])[0].pooled
    logits = reference(recordings()[:1]).prediction_logits
    assert_close(model.network.heads["class"](torch.as_tensor(pooled)), logits)
    model.export(tmp_path / "b")
    assert_same_weights(transformers.PatchTSTForClassification.from_pretrained(tmp_path / "b"), reference)


def test_the_encoder_of_a_forecaster_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, "PatchTSTForPrediction", prediction_length=4)
    reference = transformers.PatchTSTForPrediction.from_pretrained(folder)
    features = pm.load(folder).network.streams["sensor"].encoder(recordings(), torch.tensor([21, 21]))
    assert_close(features.x_UND, reference.model(recordings()).last_hidden_state.transpose(1, 2).flatten(1, 2))


def test_short_windows_are_read_from_their_end_whatever_the_batch() -> None:
    torch.manual_seed(0)
    config = ENCODERS.parse(
        {"use": "patchtst", "num_channels": 3, "context_length": 21, "patch_size": 6, "stride": 4, "width": 16}
    )
    encoder = config.build().eval()
    lengths = torch.tensor([13, 21, 4])
    batch = torch.zeros(3, 21, 3)
    for row, length in enumerate(lengths.tolist()):
        batch[row, :length] = recordings(length)[0]
    together = encoder(batch, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(batch[row : row + 1, :length], lengths[row : row + 1])
        count = config.num_features(length)
        torch.testing.assert_close(together.x_UND[row, :count], alone.x_UND[0], atol=1e-5, rtol=1e-5)
        assert together.is_valid_UN[row].sum() == count
    with pytest.raises(ConfigError, match="a window of 22 steps, expected at most context_length 21"):
        encoder(torch.zeros(1, 22, 3), torch.tensor([22]))


def test_what_is_not_built_and_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="channel_attention: True, expected False"):
        pm.load(saved(tmp_path / "a", channel_attention=True))
    assert_missing_is_named(saved(tmp_path / "b"), "encoder.layers.1.ff.3.bias")
