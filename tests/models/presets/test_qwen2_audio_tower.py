"""The audio tower of Qwen2-Audio against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.models.compose import MultimodalModel
from polymodal.models.connectors import CONNECTORS
from polymodal.models.presets import find_size
from polymodal.models.presets.qwen2_audio_tower import CONNECTOR, projector_names
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .reference import assert_close, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("transformers.models.qwen2_audio.modeling_qwen2_audio")

RATE = 16_000


def make(folder: Path) -> Path:
    """A tower of clips of one second."""
    config = transformers.Qwen2AudioEncoderConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=16,
        max_source_positions=50,
    )  # fmt: skip
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1, return_attention_mask=True)
    model = randomise(transformers.Qwen2AudioEncoder(config))
    return save_reference(model, folder, extractor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tower"))


def waves(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.9, 0.9, length).astype(np.float32) for length in lengths]


def reference_features(folder: Path, wave: np.ndarray) -> Any:
    """As the whole model runs its tower: padded to a full clip, with a mask over what was not recorded."""
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    tower = transformers.Qwen2AudioEncoder.from_pretrained(folder).eval()
    inputs = extractor(wave, sampling_rate=RATE, padding="max_length", return_attention_mask=True, return_tensors="pt")
    states, outputs = tower._get_feat_extract_output_lengths(inputs.attention_mask.sum(-1))
    is_valid = torch.arange(50)[None] < states[:, None]
    mask = torch.zeros(1, 1, 50, 50).masked_fill(~is_valid[:, None, None], float("-inf"))
    with torch.no_grad():
        found = tower(inputs.input_features, attention_mask=mask).last_hidden_state
    return found[0, : int(outputs[0])]


@pytest.mark.parametrize("num_samples", [900, 5_000, 7_777, 15_700, 15_850, 15_999, 16_000])
def test_features_equal_the_reference(folder: Path, num_samples: int) -> None:
    wave = waves(num_samples)[0]
    found = pm.load(folder).features([pm.Audio(wave, rate_hz=RATE)])[0].features[0]
    assert_close(found, reference_features(folder, wave))


def test_a_padded_batch_is_what_each_recording_is_alone(folder: Path) -> None:
    model = pm.load(folder)
    encoder, reader = model.network.streams["audio"].encoder, model.engine.processor.streams["audio"].reader
    units = [reader.read(pm.Audio(wave, rate_hz=RATE)).units[0] for wave in waves(700, 16_000, 100, 9_100)]
    values = torch.zeros(len(units), max(map(len, units)), 16)
    for row, unit in enumerate(units):
        values[row, : len(unit)] = torch.from_numpy(unit)
    with torch.no_grad():
        together = encoder(values, torch.tensor([len(unit) for unit in units]))
        for row, unit in enumerate(units):
            alone = encoder(torch.from_numpy(unit)[None], torch.tensor([len(unit)]))
            count = encoder.config.num_features(len(unit))
            assert int(together.is_valid_UN[row].sum()) == alone.x_UND.shape[1] == count
            assert_close(together.x_UND[row, :count], alone.x_UND[0])


def test_the_connector_is_the_reference_projector() -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": 12, "encoder_layers": 1},
        text_config={"model_type": "qwen2", "hidden_size": 20},
    )
    theirs = randomise(library.Qwen2AudioMultiModalProjector(config))
    ours = CONNECTORS.parse(CONNECTOR).build(12, 20)
    table = projector_names("", "")
    ours.load_state_dict(table.load(list(ours.state_dict()), theirs.state_dict(), "projector"))
    x = torch.randn(2, 3, 12)
    with torch.no_grad():
        assert_close(ours(x, torch.ones(2, 3, dtype=torch.bool))[0], theirs(x))


def test_export_reloads_there_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    assert pm.load(folder).export(tmp_path / "out") == "qwen2_audio_encoder"
    again, first = (transformers.Qwen2AudioEncoder.from_pretrained(path) for path in (tmp_path / "out", folder))
    assert_same_weights(again, first)


def test_the_published_size_has_its_number_of_parameters() -> None:
    architecture, size = find_size("qwen2-audio-tower")
    model = architecture.model(HubConfigs(size.config, size.preprocessor))
    with no_weights():
        network = MultimodalModel(model, 64)
    with torch.device("meta"):
        reference = transformers.Qwen2AudioEncoder(transformers.Qwen2AudioEncoderConfig())
    # The positions are a parameter there, and stored but never trained in both.
    ours = num_parameters(network) + network.streams["audio"].encoder.positions_ND.numel()
    assert ours == num_parameters(reference) == size.parameters
