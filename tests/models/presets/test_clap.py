"""CLAP against the reference library."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import polymodal as pm
from polymodal.core.batch import Outputs
from polymodal.core.errors import ConfigError
from polymodal.objectives.infonce import InfoNCE

from .reference import (
    assert_close,
    assert_missing_is_named,
    assert_published_size,
    assert_same_weights,
    randomise,
    save_reference,
)

transformers = pytest.importorskip("transformers")

TEXTS = ["a dog barks", "rain", "the sound of a large engine that starts, twice", ""]
RATE = 48_000


def tokenizer() -> Any:
    from tokenizers import pre_tokenizers

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("d", "o"), ("do", "g"), ("r", "a"), ("i", "n"), ("ra", "in")]
    pieces += [first + second for first, second in merges] + ["<mask>"]
    return transformers.RobertaTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=merges)


def make(folder: Path, *, fused: bool) -> Path:
    words = tokenizer()
    # The reference shrinks long recordings to 64 bands, whatever the config says.
    mels = 64 if fused else 16
    config = transformers.ClapConfig(
        audio_config={
            "window_size": 4, "num_mel_bins": mels, "spec_size": 128 if fused else 64, "hidden_size": 32,
            "patch_embeds_hidden_size": 16, "depths": [2, 2], "num_attention_heads": [2, 4], "enable_fusion": fused,
            "fusion_type": "aff_2d" if fused else None,
        },
        text_config={
            "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "max_position_embeddings": 90,
        },
        projection_dim=24,
    )  # fmt: skip
    extractor = transformers.ClapFeatureExtractor(
        feature_size=mels, sampling_rate=RATE, max_length_s=2, truncation="fusion" if fused else "rand_trunc"
    )
    torch.manual_seed(0)
    return save_reference(randomise(transformers.ClapModel(config)), folder, words, extractor)


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("unfused"), fused=False)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("fused"), fused=True)


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    place = np.arange(round(seconds * RATE))
    return (0.5 * np.sin(place * rng.uniform(0.01, 0.2)) + rng.uniform(-0.3, 0.3, len(place))).astype(np.float32)


def reference(folder: Path) -> tuple[Any, Any]:
    model = transformers.ClapModel.from_pretrained(folder).eval()
    return model, transformers.ClapFeatureExtractor.from_pretrained(folder)


@pytest.mark.parametrize("seconds", [0.3, 1.1, 2.0])
def test_embeddings_of_recordings_equal_the_reference_from_files(unfused: Path, tmp_path: Path, seconds: float) -> None:
    wave = sound(seconds)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    theirs, extractor = reference(unfused)
    inputs = extractor(wave, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        expected = theirs.get_audio_features(**inputs).pooler_output
        states = theirs.audio_model(**inputs).last_hidden_state
    ours = pm.load(unfused)
    assert_close(ours.embed([pm.Audio(tmp_path / "a.wav")]), expected)
    # Features stand in order of time; the reference keeps [width, bands, time].
    features = ours.features([pm.Audio(wave, rate_hz=RATE)])[0].features
    assert_close(features, states.permute(0, 3, 2, 1).flatten(1, 2))


def test_embeddings_of_texts_equal_the_reference_in_a_batch_of_mixed_lengths(unfused: Path) -> None:
    theirs, _ = reference(unfused)
    words = transformers.AutoTokenizer.from_pretrained(unfused)
    with torch.no_grad():
        expected = theirs.get_text_features(**words(TEXTS, padding=True, return_tensors="pt")).pooler_output
    assert_close(pm.load(unfused).embed(TEXTS), expected)


def test_each_direction_has_its_scale(unfused: Path) -> None:
    theirs, extractor = reference(unfused)
    words = transformers.AutoTokenizer.from_pretrained(unfused)
    waves = [sound(1.0, seed) for seed in range(3)]
    inputs = {**words(TEXTS, padding=True, return_tensors="pt")}
    inputs |= {**extractor(waves, sampling_rate=RATE, return_tensors="pt")}
    with torch.no_grad():
        expected = theirs(**inputs)
    ours = pm.load(unfused)
    audio, text = (torch.from_numpy(ours.embed(parts)) for parts in ([pm.Audio(w, rate_hz=RATE) for w in waves], TEXTS))
    head = ours.network.heads["projection"]
    assert head.output_scale("audio") != head.output_scale("text")
    with torch.no_grad():
        assert_close(audio @ text.T * head.output_scale("audio"), expected.logits_per_audio)
        assert_close(text @ audio.T * head.output_scale("text"), expected.logits_per_text)
        both = (head.output_scale("audio") * head.output_scale("text")).sqrt()
    torch.testing.assert_close(head.pair_scale("audio", "text"), both)


def test_a_fused_tower_mixes_in_the_crops_of_long_recordings_alone(
    fused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, extractor = reference(fused)
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    waves = [sound(0.7), sound(5.3), sound(2.0), sound(9.0)]
    is_longer = torch.tensor([[False], [True], [False], [True]])
    inputs = extractor(waves, sampling_rate=RATE, return_tensors="pt")
    assert (inputs["is_longer"] == is_longer).all()
    with torch.no_grad():
        expected = theirs.get_audio_features(inputs["input_features"], is_longer=is_longer).pooler_output
        unmixed = theirs.get_audio_features(inputs["input_features"], is_longer=~is_longer & False).pooler_output
    assert (expected - unmixed).abs().amax(dim=1).gt(1e-3).tolist() == [False, True, False, True]
    assert_close(pm.load(fused).embed([pm.Audio(wave, rate_hz=RATE) for wave in waves]), expected)


def test_long_recordings_are_heard_whole(unfused: Path) -> None:
    model = pm.load(unfused)
    wave = sound(5.0)
    pooled = model.features([pm.Audio(wave, rate_hz=RATE)])[0].pooled
    clips = [
        model.features([pm.Audio(part, rate_hz=RATE)])[0].pooled[0] for part in (wave[:96_000], wave[96_000:192_000])
    ]
    assert pooled.shape == (3, 32)
    assert_close(pooled[:2], np.stack(clips))


def test_training_moves_both_scales(unfused: Path) -> None:
    network = pm.load(unfused).network
    head = network.heads["projection"].train()
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(4)
    vectors = {name: (head(torch.randn(4, 32, generator=generator), name), owners) for name in ("audio", "text")}
    outputs = Outputs(embeddings=vectors, scale=head.scale, pair_scale=head.pair_scale)
    objective = InfoNCE(pairs=(("audio", "text"),))
    objective(outputs, SimpleNamespace(labels=[None] * 4)).total.backward()
    for name in ("audio", "text"):
        assert head.log_scales[name].grad.abs() > 0


@pytest.mark.parametrize("kind", ["unfused", "fused"])
def test_export_reloads_there_bit_for_bit(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(kind)
    assert pm.load(folder).export(tmp_path / "out") == "clap"
    first, again = (reference(path) for path in (folder, tmp_path / "out"))
    assert_same_weights(again[0], first[0])
    np.testing.assert_array_equal(again[1].mel_filters_slaney, first[1].mel_filters_slaney)
    assert again[1].truncation == first[1].truncation and again[1].nb_max_samples == first[1].nb_max_samples


def test_what_does_not_fit_is_named(unfused: Path, tmp_path: Path) -> None:
    config = json.loads((unfused / "config.json").read_text())
    config["audio_config"]["fusion_type"] = "channel_map"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="clap: found fusion_type: 'channel_map', expected None or 'aff_2d'"):
        pm.load(tmp_path)


def test_a_missing_tensor_is_named(unfused: Path) -> None:
    assert_missing_is_named(unfused, "audio_projection.linear2.bias")


@pytest.mark.parametrize("name", ["clap-htsat-unfused", "clap-htsat-fused", "larger-clap-general"])
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    assert_published_size(name, lambda config: transformers.ClapModel(transformers.ClapConfig(**config)), rows=50_265)
